"""The state that a process inherits from its parent: a run sets everything that it depends on.

A parent may have ignored or blocked any signal, and an `exec` keeps both. Python does not reset
this, and `subprocess` restores for a command only the signals that Python itself ignores.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import Final, NoReturn

from shmepoch.cli.run.descendants import children, end_with_parent
from shmepoch.cli.run.interruptions import INTERRUPTIONS

#: The signals that Python ignores for itself, and that `subprocess` restores for a command.
_OF_PYTHON: Final = frozenset({signal.SIGPIPE, signal.SIGXFSZ})
#: The permission bits of a file's owner.
_OWNER: Final = 0o700


def set_for_run() -> None:
    """Set what a run needs, before its first child. `on_interruption` sets its handlers."""
    # While it is ignored, the kernel discards the status of every child.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(os.umask(_OWNER) & ~_OWNER)


def set_for_commands(descriptors: int) -> None:
    """Set what the commands of this process inherit: no signal is ignored or blocked.

    `descriptors` is their soft limit of open files.
    """
    for number in signal.valid_signals() - _OF_PYTHON:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, most))


def take_all_descriptors() -> int:
    """Raise the soft limit of open files to the hard limit; returns the former soft limit.

    A run has a few descriptors for each session and child, and the usual limit is too low for that.
    """
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return before


def leave_strangers() -> None:
    """Continue in a new process if this one has, or may get, children that the run did not start.

    The runtime adopts the processes that its children leave behind, and ends them. It could not
    distinguish them from other orphans: process 1 of a container gets every orphan, and children
    from before an `exec` may leave orphans too. Returns only in the process that continues. The
    other process passes signals to it, and ends with its status.
    """
    if os.getpid() != 1 and not children():
        return
    watched = {*INTERRUPTIONS, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    sys.stdout.flush()
    parent = os.getpid()
    child = os.fork()
    if child != 0:
        _stand_in_for(child, watched)
    # Otherwise a terminal would send it the signals that the parent passes on, too. It may write to
    # the terminal all the same.
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    end_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stand_in_for(child: int, watched: set[signal.Signals]) -> NoReturn:
    while True:
        number = signal.sigwait(watched)
        if number != signal.SIGCHLD:
            os.kill(child, number)  # not reaped yet, so no other process has its number
            continue
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            if ended[0] == child:
                status = os.waitstatus_to_exitcode(ended[1])
                os._exit(status if status >= 0 else 128 - status)
