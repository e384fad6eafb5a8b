"""Combining updates: how long it takes, how much memory, how exact it is, against other ways."""
