"""How fast records become JSON and come back: `python -m benchmarks.records`."""
