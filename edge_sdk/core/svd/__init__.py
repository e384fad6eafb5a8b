"""Singular value decompositions of sums of low-rank products."""
