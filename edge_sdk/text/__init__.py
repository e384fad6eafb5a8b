"""The owner's text, from files to tokens."""
