"""Numbers of seconds, as every call that waits takes them."""

from __future__ import annotations

from numbers import Real
from typing import Final

from shmepoch.errors import ConfigInvalid

#: About 32 years. A longer wait is one without a limit: no clock has to hold its end.
_FOREVER_S: Final = 1e9


def limit_s(timeout: object, setting: str = "timeout") -> float | None:
    """How many seconds to wait at most; None for as long as it takes.

    Takes every kind of real number, numpy's too. Infinity and what no clock holds is no limit, less
    than nothing is nothing. `ConfigInvalid` for what is no number of seconds.
    """
    if timeout is None:
        return None
    if not isinstance(timeout, Real) or timeout != timeout:
        raise ConfigInvalid(setting, timeout, "a number of seconds")
    # Compared before it is converted: an integer may be larger than every float.
    if timeout < 0:
        return 0.0
    return float(timeout) if timeout < _FOREVER_S else None
