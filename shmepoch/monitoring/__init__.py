"""Monitoring: reads the epochs of other processes without a lock, and changes nothing in them."""

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
