"""Processes that attach to a segment themselves, and may be killed."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable

from shmepoch.memory.participants import Role
from shmepoch.memory.segment import SharedSegment


def attached(namespace: str, parent: SharedSegment, act: Callable[[SharedSegment], object]) -> int:
    """The pid of a forked process that attaches to `parent`'s segment for itself and acts on it.

    It exits with 0 if it lives through the act, and with 1 if the act raises.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        segment = SharedSegment.attach(namespace, parent.session_id)
        segment.join(Role.WORKER)
        act(segment)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def survived(pid: int) -> bool:
    """Whether a process finished its act, and was not killed in it."""
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"the act itself failed: {code}"
    return code == 0
