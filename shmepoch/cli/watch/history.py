"""The last minute of an epoch: its lag, and its completions per second."""

from __future__ import annotations

from collections import deque
from typing import Final

#: The length and the number of the steps of a minute. Steps begin at whole multiples of the length,
#: so that a sparkline moves by one.
STEP_S: Final = 4.0
STEPS: Final = 15
#: The least time that a rate covers, if the history is that long.
_RATE_S: Final = 4.0
#: The least time that a rate is divided by: one completion in a moment makes no high rate.
_LEAST_S: Final = 1.0


class _Step:
    __slots__ = ("completions", "lag", "seconds")

    def __init__(self) -> None:
        self.completions = 0
        self.lag = 0
        self.seconds = 0.0


class History:
    """The last steps of one epoch, computed from the polls.

    Times are seconds of one clock that does not go backwards.
    """

    def __init__(self) -> None:
        self._steps: deque[_Step | None] = deque(maxlen=STEPS)
        self._number = 0
        self._seen_at: float | None = None
        self._watermark = 0

    def add(self, now: float, watermark: int, lag: int) -> None:
        """Note the feed's watermark now, and the lag of its last cursor."""
        step = self._step(int(now // STEP_S))
        step.lag = max(step.lag, lag)
        if self._seen_at is not None:
            step.seconds += now - self._seen_at
            step.completions += max(0, watermark - self._watermark)
        self._seen_at = now
        self._watermark = watermark

    def _step(self, number: int) -> _Step:
        last = self._steps[-1] if self._steps else None
        if last is None or number > self._number:
            missed = number - self._number - 1 if last is not None else 0
            self._steps.extend([None] * min(STEPS, missed))  # there was no poll then
            last = _Step()
            self._steps.append(last)
            self._number = number
        return last

    @property
    def lags(self) -> list[float | None]:
        """The largest lag of each step; None for a step without a poll."""
        return [None if step is None else step.lag for step in self._steps]

    @property
    def rates(self) -> list[float | None]:
        """The completions per second of each step; the last step has not ended yet."""
        return [_rate(step.completions, step.seconds) if step else None for step in self._steps]

    @property
    def rate(self) -> float:
        """The completions per second, of about the last few seconds."""
        completions, seconds = 0, 0.0
        for step in reversed(self._steps):
            if step is None or seconds >= _RATE_S:
                break
            completions += step.completions
            seconds += step.seconds
        return _rate(completions, seconds) or 0.0


def _rate(completions: int, seconds: float) -> float | None:
    return completions / max(seconds, _LEAST_S) if seconds > 0 else None
