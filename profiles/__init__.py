"""Data only: one TOML file per device class. Installed as `edge_sdk.profiles`, read by importlib.resources."""
