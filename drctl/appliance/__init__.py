"""The service of one host: supervisor, control socket, protection, recovery."""
