"""shmepoch beside its alternatives, measured in one run."""
