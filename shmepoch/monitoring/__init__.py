"""What people see of epochs that other processes run: read without a lock, and left as it is."""

from shmepoch.monitoring.details import EpochDetails, describe
from shmepoch.monitoring.epochs import EpochState, EpochSummary, summaries, summarize
from shmepoch.monitoring.selection import EpochAmbiguous, EpochUnknown, select

__all__ = [
    "EpochAmbiguous",
    "EpochDetails",
    "EpochState",
    "EpochSummary",
    "EpochUnknown",
    "describe",
    "select",
    "summaries",
    "summarize",
]
