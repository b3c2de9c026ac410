"""Forks: what each part of the library does around one, in one stated order.

A forked child has one thread, and everything that its parent had: descriptors, mappings, and locks.
A lock that another thread of the parent held is held for ever in the child. Each part gives up in
the child what is the parent's alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Final, NamedTuple, TypeAlias

_log = logging.getLogger(__name__)

Hook: TypeAlias = Callable[[], None]


class Part(IntEnum):
    """The parts that a fork concerns. After it they follow in this order, before it in the other.

    So a fork waits for a store's disk while it holds nothing else, and a child has left its
    parent's locks before it does anything that could fail.
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
    """Have these called around every fork, in the order of the parts; once for each part."""
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
    """Call every hook. One that fails does not keep the others from being called: an exception
    would not stop the fork."""
    for hook in hooks:
        if hook is not None:
            try:
                hook()
            except BaseException:
                _log.exception("a fork: %s failed", hook.__qualname__)


os.register_at_fork(
    before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
