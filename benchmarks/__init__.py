"""Speed and memory, measured: `python -m benchmarks.aggregation`. Ratios within one run, not bare seconds."""
