"""Bytes shared by processes; nothing in this package knows what a session is."""
