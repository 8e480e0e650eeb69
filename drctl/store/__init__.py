"""Blocking files of the recovery side and of the rings. Knows no network, no event loop."""
