"""TOML files whose keys know their lines."""
