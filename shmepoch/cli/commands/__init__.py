"""The commands, each in one file: its arguments, its work and its output."""
