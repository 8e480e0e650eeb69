"""Recovery at this host: tests, failovers, switchovers, and what undoes them or makes them final."""
