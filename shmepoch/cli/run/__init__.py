"""`shmepoch run`: shell commands as operations of a runtime, an agent and workers."""
