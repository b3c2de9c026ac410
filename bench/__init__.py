"""Benchmarks of shmepoch and its alternatives, measured in one run."""
