"""`python -m shmepoch` is the `shmepoch` command."""

from shmepoch.cli import main

main()
