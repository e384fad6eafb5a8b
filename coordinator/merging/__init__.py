"""One published version from the updates of a buffer."""
