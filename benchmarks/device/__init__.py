"""What a device spends: memory, time, and what the agent adds to them."""
