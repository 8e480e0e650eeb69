"""An embedded world of two sites for newcomers, tests and benchmarks."""
