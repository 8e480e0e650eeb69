"""Bytes to values and back, sans-IO. Knows no sockets, no files."""
