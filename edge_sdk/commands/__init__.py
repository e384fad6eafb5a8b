"""The commands of `edge-sdk`, one a file."""
