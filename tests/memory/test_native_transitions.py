"""The arguments of the native transitions; what they do is tested with the registry."""

from __future__ import annotations

from typing import Any, Final

import pytest

from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from shmepoch.epoch.transitions import facts
from shmepoch.memory._native import Memory
from shmepoch.memory.layout import DETAIL_LIMIT, SPEC_LIMIT, OpsLifecycleConfig
from shmepoch.memory.segment import Segment

SEGMENT: Final = Segment.private(OpsLifecycleConfig(max_operations=4, max_completed=3))
SIZE: Final = SEGMENT.layout.size
FACTS: Final[dict[str, Any]] = facts(SEGMENT.layout)
#: Those that are lengths or limits rather than offsets of words.
OTHERS: Final = {
    "ring",
    "slots",
    "slot_size",
    "lanes",
    "detail_limit",
    "max_operations",
    "max_completed",
}
OFFSETS: Final = sorted(FACTS.keys() - OTHERS)
ID: Final = bytes(range(16))
TOP: Final = 2**64 - 1


@pytest.fixture
def native() -> Any:
    segment = Segment.private(OpsLifecycleConfig(max_operations=4, max_completed=3))
    return segment.memory.transitions(**facts(segment.layout))


@pytest.mark.parametrize("value", [-8, 1, SIZE - 4, SIZE, 2**62])
@pytest.mark.parametrize("name", OFFSETS)
def test_an_offset_outside_or_across_two_words(name: str, value: int) -> None:
    with pytest.raises(IndexError, match="word-aligned inside a memory"):
        Memory.private(SIZE).transitions(**FACTS | {name: value})


@pytest.mark.parametrize("value", [-1, 2**40, 2**62])
@pytest.mark.parametrize("name", ["slots", "slot_size", "lanes", "detail_limit"])
def test_a_length_that_does_not_fit(name: str, value: int) -> None:
    with pytest.raises(IndexError, match="word-aligned inside a memory"):
        Memory.private(SIZE).transitions(**FACTS | {name: value})


@pytest.mark.parametrize("name", ["max_operations", "max_completed"])
def test_a_limit_below_zero(name: str) -> None:
    with pytest.raises(ValueError, match="limits are 0 or above"):
        Memory.private(SIZE).transitions(**FACTS | {name: -1})


@pytest.mark.parametrize("name", FACTS)
def test_facts_that_are_missing_or_of_another_type(name: str) -> None:
    memory: Any = Memory.private(SIZE)
    with pytest.raises(TypeError):
        memory.transitions(**{fact: FACTS[fact] for fact in FACTS if fact != name})
    with pytest.raises(TypeError):
        memory.transitions(**FACTS | {name: "x"})


def test_it_is_only_made_by_a_memory(native: Any) -> None:
    with pytest.raises(TypeError, match="cannot create"):
        type(native)()


def test_it_keeps_the_mapping() -> None:
    native: Any = Segment.private(OpsLifecycleConfig()).memory.transitions(
        **facts(Segment.private(OpsLifecycleConfig()).layout)
    )
    assert native.register(1, ID, 0, 0, 0, b"", 1, 1) == 1


CALLS: Final[dict[str, tuple[Any, ...]]] = {
    "register": (1, ID, 0, 0, 0, b"spec", 1, 4),
    "register_all": (((1, ID, b"spec"),), 0, 0, 0, 1, 4),
    "start": (1, ID, 1, 2, 0, b"detail"),
    "look": (1, ID, 0b10),
    "end": (1, 0, 0, b"entry"),
    "end_all": (1, ((0, 0, b"entry"),)),
}


@pytest.mark.parametrize("name", CALLS)
def test_any_number_of_arguments(native: Any, name: str) -> None:
    """Of whatever type: an error, or an answer."""
    for arity in range(10):
        for argument in (None, -1, 7, "x", (1, 2), 2**70, b"x" * 16):
            with pytest.raises((TypeError, ValueError, OverflowError, IndexError)):
                getattr(native, name)(*[argument] * arity)


@pytest.mark.parametrize("name", CALLS)
def test_each_argument_of_another_type(native: Any, name: str) -> None:
    for position in range(len(CALLS[name])):
        arguments = list(CALLS[name])
        arguments[position] = None
        with pytest.raises(TypeError):
            getattr(native, name)(*arguments)


@pytest.mark.parametrize(
    ("name", "position", "value"),
    [
        ("register", 0, 0),
        ("register", 1, ID[:-1]),
        ("register", 1, ID + b"x"),
        ("register", 5, b"x" * (SPEC_LIMIT + 1)),
        ("register", 6, 0),
        ("register", 6, 4),
        ("register_all", 0, ((1, ID, b"spec"), (0, ID, b"spec"))),
        ("register_all", 0, ((1, ID, b"spec"), (1, ID[:-1], b"spec"))),
        ("register_all", 0, ((1, ID, b"spec"), (1, ID, b"x" * (SPEC_LIMIT + 1)))),
        ("register_all", 4, 0),
        ("register_all", 4, 4),
        ("start", 0, 0),
        ("start", 1, b""),
        ("start", 2, 4),
        ("start", 3, TOP),
        ("start", 5, b"x" * (DETAIL_LIMIT + 1)),
        ("look", 0, 0),
        ("look", 1, ID * 2),
        ("end", 1, 7),
        ("end", 1, TOP),
        ("end_all", 1, ((0, 0, b"entry"), (7, 0, b"entry"))),
        ("end_all", 1, ((TOP, 0, b"entry"),)),
    ],
)
def test_values_out_of_range(native: Any, name: str, position: int, value: object) -> None:
    arguments = list(CALLS[name])
    arguments[position] = value
    with pytest.raises((ValueError, IndexError)):
        getattr(native, name)(*arguments)


@pytest.mark.parametrize("name", ["register_all", "end_all"])
@pytest.mark.parametrize(
    "several", [[], (7,), ((),), ((1, ID),), ((1, ID, b"", 0),), ((None,) * 3,), ((0, 0, "x"),)]
)
def test_several_that_are_no_tuple_of_threes(native: Any, name: str, several: object) -> None:
    arguments = [several if isinstance(one, tuple) else one for one in CALLS[name]]
    with pytest.raises(TypeError):
        getattr(native, name)(*arguments)


def test_more_entries_than_the_ring_has_room_for(native: Any) -> None:
    _, capacity, _, budget = SEGMENT.layout.ring
    assert native.end_all(1, ((0, 0, b""),) * (capacity + 1)) is None
    assert native.end_all(1, ((0, 0, bytes(budget // 2)),) * 2) is None
    assert native.end_all(1, ((0, 0, bytes(budget // 2 - 8)),) * 2) is True


def test_an_entry_that_does_not_fit_is_not_written(native: Any) -> None:
    assert native.register(*CALLS["register"]) == 1
    budget = SEGMENT.layout.ring[3]
    assert native.end(1, 0, 0, bytes(budget)) is None
    assert native.end(2, 0, 0, b"entry") is None
    assert native.look(1, ID, 0b10)[:3] == (1, 0, 1)


def test_facts_are_those_of_the_registry() -> None:
    """A registry is made from them, so a name too many or too few would show."""
    assert RuntimeOpsLifecycleRegistry(SEGMENT).active_count() == 0
