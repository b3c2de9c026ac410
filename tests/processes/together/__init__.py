"""A test run of its own, whose pytest-xdist workers share one epoch."""
