"""TOML plans, compiled to steps and run one at a time."""
