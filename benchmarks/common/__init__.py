"""What several benchmarks share: clients, one federation in a process, a log of results, plots."""
