"""Adapter files on their way in and out."""
