"""What devices and coordinator share: pure functions and records on numpy arrays. No I/O, clock or network."""
