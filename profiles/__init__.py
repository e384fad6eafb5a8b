"""Data only: one TOML file per device class, installed as `edge_sdk.profiles`."""
