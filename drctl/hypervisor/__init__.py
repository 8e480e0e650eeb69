"""Drivers of hypervisors, one shape, and the pure definitions beside them."""
