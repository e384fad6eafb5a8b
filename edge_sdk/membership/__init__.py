"""Who the device is in its federation, and what of that survives a restart."""
