"""What people see of epochs that other processes run: read without a lock, and left as it is."""

from shmepoch.monitoring.epochs import EpochState, EpochSummary, summaries, summarize

__all__ = ["EpochState", "EpochSummary", "summaries", "summarize"]
