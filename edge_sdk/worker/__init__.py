"""Both sides of the process that trains: the one that drives it, and the one that runs in it."""
