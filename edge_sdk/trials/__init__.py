"""What cannot be looked up and is tried on the machine itself, in child processes."""
