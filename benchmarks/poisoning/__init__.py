"""Hostile updates, and what defences keep of a federation."""
