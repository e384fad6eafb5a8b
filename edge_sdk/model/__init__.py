"""The base model: finding its files, loading it in 4 bits, generating text with it."""
