"""Speed, memory and learning, measured: `python -m benchmarks` lists what there is.

Speeds are given as ratios within one run, not as bare seconds.
"""
