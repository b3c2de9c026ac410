"""The commands, one a file: what each is called with, what it does, and what it shows."""
