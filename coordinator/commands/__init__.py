"""The commands of `edge-coordinator`, one a file: each adds its flags and runs."""
