"""What a process inherits from its parent: a run sets all of it that it depends on.

A parent may have ignored or blocked any signal, and an `exec` keeps both. Python looks at none of
this, and `subprocess` gives back to a command only what Python itself ignores.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import Final, NoReturn

from shmepoch.cli.run.descendants import children, end_with_parent
from shmepoch.cli.run.interruptions import INTERRUPTIONS

#: What Python ignores for itself, and `subprocess` gives back to a command.
_OF_PYTHON: Final = frozenset({signal.SIGPIPE, signal.SIGXFSZ})
#: What the owner of a file may do with it.
_OWNER: Final = 0o700


def set_for_run() -> None:
    """Set what a run needs; before its first child. What it hears is `on_interruption`'s to set."""
    # While it is ignored the kernel throws the status of every child away.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(os.umask(_OWNER) & ~_OWNER)


def set_for_commands(descriptors: int) -> None:
    """Set what the commands of this process inherit: no signal ignored, none blocked.

    `descriptors` is how many they may have open at first.
    """
    for number in signal.valid_signals() - _OF_PYTHON:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, most))


def take_all_descriptors() -> int:
    """Let this process have as many descriptors as it may; how many it could have had before.

    A run has a few for each session and child, and the usual limit is for programs that have few.
    """
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return before


def leave_strangers() -> None:
    """Go on in a process of its own if this one has, or may get, children that no run started.

    The runtime adopts what its children leave behind, and ends it. Where others hand their orphans
    to the same process, nothing tells these from those: process 1 of a container gets every orphan
    there is, and children that were there before an `exec` have children too. Returns only in the
    process that is to go on; the other one passes signals to it, and ends as it does.
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
    # Or a terminal would send it what the parent passes on. There it may write all the same.
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
