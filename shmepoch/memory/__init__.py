"""Memory that processes share: segments, their locks, participants, waiters and doorbells."""
