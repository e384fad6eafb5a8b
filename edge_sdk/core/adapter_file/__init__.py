"""Adapters as safetensors files: header, dtypes, encoding and checked decoding."""
