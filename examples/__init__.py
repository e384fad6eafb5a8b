"""Programs that show the SDK at work, and the data they use."""
