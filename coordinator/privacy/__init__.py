"""Differential privacy: the mechanism, its accountant, and the ledger of what was spent."""
