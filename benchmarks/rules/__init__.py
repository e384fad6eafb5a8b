"""The merge rules compared."""
