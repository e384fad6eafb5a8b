"""The HTTP face: routes, and how request bodies come in."""
