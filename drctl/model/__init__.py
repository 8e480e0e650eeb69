"""Nouns as frozen values. Knows no I/O, no clock, no logging."""
