"""What devices and coordinator share: pure functions and records on numpy arrays. No clock, no network."""
