"""The stores of groups that are replicated to this host: received, seeded, served, kept, let go."""
