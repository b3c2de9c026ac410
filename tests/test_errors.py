"""Every error is made with its facts, shows them, and arrives whole in another process."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shmepoch
from shmepoch.cli.run.jobs import Job
from shmepoch.cli.run.plan import RunRefused
from shmepoch.errors import (
    MaxConcurrentExceeded,
    NotFound,
    OutcomeDropped,
    PayloadTooLarge,
    RecordInvalid,
    ShmepochError,
    StoreError,
    WaitAlreadyActive,
)
from shmepoch.ids import OperationId, RuntimeEpochId, SessionId
from shmepoch.memory.participants import Participant, Role
from shmepoch.monitoring.selection import Candidate

#: Those that are only there to be caught.
BASES = (ShmepochError, StoreError, RunRefused)
ID = OperationId.new()
#: What a fact may be, by its type.
VALUES: dict[str, Any] = {
    "str": "some {text}",
    "str | None": "some {text}",
    "int": 7,
    "int | None": 7,
    "float": 0.5,
    "bool": True,
    "object": b"{}",
    "Path": Path("/some/{path}"),
    "OperationId": ID,
    "OperationId | None": ID,
    "SessionId": SessionId.new(),
    "RuntimeEpochId": RuntimeEpochId.new(),
    "Job | None": Job(3, "echo {}"),
    "tuple[Candidate, ...]": (Candidate("prod", SessionId.new(), None),),
    "tuple[str, ...]": ("{a}", "b"),
    "tuple[SessionId, ...]": (SessionId.new(),),
    "Sequence[Participant]": [
        Participant(
            slot=0, number=1, role=Role.WORKER, pid=2, joined_at_ms=3, alive=True, is_self=False
        )
    ],
}


def subclasses(kind: type[ShmepochError]) -> Iterator[type[ShmepochError]]:
    for below in kind.__subclasses__():
        if below.__module__.startswith("shmepoch."):
            yield below
            yield from subclasses(below)


def errors() -> list[type[ShmepochError]]:
    """Every class of the package that is raised."""
    for module in pkgutil.walk_packages(shmepoch.__path__, "shmepoch."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found = set(subclasses(ShmepochError)).difference(BASES)
    return sorted(found, key=lambda kind: kind.__name__)


def facts_of(kind: type[ShmepochError]) -> dict[str, Any]:
    facts = {name: VALUES[annotation] for name, annotation in kind._facts.items()}
    return facts | {"function": "inject"} if "function" in facts else facts


@pytest.mark.parametrize("kind", errors())
def test_an_error_arrives_whole_in_another_process(kind: type[ShmepochError]) -> None:
    facts = facts_of(kind)
    error = kind(*facts.values())
    assert vars(error) == facts
    assert error.args == (str(error),)
    error.add_note("seen in a worker")
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is kind
    assert (str(arrived), arrived.args, vars(arrived)) == (str(error), error.args, vars(error))


@pytest.mark.parametrize("kind", errors())
def test_facts_are_taken_by_name_too(kind: type[ShmepochError]) -> None:
    facts = facts_of(kind)
    error = kind(**facts)
    assert (vars(error), str(error)) == (facts, str(kind(*facts.values())))


def test_a_fact_with_a_value_is_optional() -> None:
    assert vars(PayloadTooLarge(2, 1, "it")) == {
        "size": 2,
        "limit": 1,
        "what": "it",
        "setting": None,
    }
    assert MaxConcurrentExceeded(1, 1, setting="that").setting == "that"
    assert "larger max_concurrent" in str(MaxConcurrentExceeded(1, 1))


def test_braces_in_a_fact_mean_nothing() -> None:
    assert str(RecordInvalid("{reason}", "{")) == "not a valid {reason}: {"


# mypy finds each of them, too: it does not take an ignore that nothing needs.
WRONG: dict[str, Callable[[], object]] = {
    "missing": lambda: NotFound(),  # type: ignore[call-arg]
    "missing of a base": lambda: OutcomeDropped(),  # type: ignore[call-arg]
    "missing before an optional one": lambda: MaxConcurrentExceeded(1, entering=2),  # type: ignore[call-arg]
    "unknown": lambda: NotFound(ID, name="it"),  # type: ignore[call-arg]
    "unknown instead": lambda: NotFound(name="it"),  # type: ignore[call-arg]
    "doubled": lambda: NotFound(ID, id=ID),  # type: ignore[misc]
    "too many": lambda: NotFound(ID, ID),  # type: ignore[call-arg]
    "any": lambda: WaitAlreadyActive(1),  # type: ignore[arg-type]
    "any by name": lambda: WaitAlreadyActive(id=ID),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
def test_other_facts_than_those_of_the_class_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=r"\w+\([\w, ]*\) was given"):
        make()


@pytest.mark.parametrize("kind", BASES)
def test_a_class_without_a_text_is_not_raised(kind: type[ShmepochError]) -> None:
    with pytest.raises(AttributeError, match="message"):
        kind()
