"""Buffered against synchronous federations, in virtual time."""
