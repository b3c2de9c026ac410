"""Forks: the hooks of each part of the library around a fork, in a fixed order.

A forked child has one thread, and all of its parent's descriptors, mappings and locks. A lock that
another thread of the parent held stays locked for ever in the child. In the child, each part
releases the things that belong to the parent alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Final, NamedTuple, TypeAlias

from shmepoch.events import Event, about

_log = logging.getLogger(__name__)

Hook: TypeAlias = Callable[[], None]


class Part(IntEnum):
    """The parts with hooks. After a fork they are called in this order, before it in reverse.

    So a fork waits for a store's disk before it holds other locks, and a child leaves its parent's
    locks before it does anything that could fail.
    """

    ATTACHMENTS = 1
    DOORBELLS = 2
    BINDINGS = 3
    STORES = 4


class _Hooks(NamedTuple):
    before: Hook | None
    in_parent: Hook | None
    in_child: Hook | None


_parts: Final[dict[Part, _Hooks]] = {}


def on_fork(
    part: Part,
    *,
    before: Hook | None = None,
    after_in_parent: Hook | None = None,
    after_in_child: Hook | None = None,
) -> None:
    """Register the hooks of a part, which are called around every fork. Once for each part."""
    if part in _parts:
        raise ValueError(f"{part!r} has its hooks already")
    _parts[part] = _Hooks(before, after_in_parent, after_in_child)


def _before() -> None:
    _call(hooks.before for _, hooks in sorted(_parts.items(), reverse=True))


def _after_in_parent() -> None:
    _call(hooks.in_parent for _, hooks in sorted(_parts.items()))


def _after_in_child() -> None:
    _call(hooks.in_child for _, hooks in sorted(_parts.items()))


def _call(hooks: Iterable[Hook | None]) -> None:
    """Call every hook, also after one has failed: an exception would not stop the fork."""
    for hook in hooks:
        if hook is not None:
            try:
                hook()
            except BaseException as error:
                _log.exception(
                    "a fork: %s failed",
                    hook.__qualname__,
                    extra=about(Event.FORK_FAILED, reason=str(error)),
                )


os.register_at_fork(
    before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
