"""The work of processes on an epoch, and the invariants of its feed."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Sequence

from shmepoch import (
    CompletionBatch,
    CompletionEntry,
    InvalidTransition,
    MaxConcurrentExceeded,
    NotFound,
    OperationId,
    OperationKind,
    OperationPeerHandle,
    OperationProgressUpdate,
    RuntimeOpsLifecycleRegistry,
    SessionRuntimeBindings,
    TrustedPeerSpec,
)
from tests.processes.children import Channel
from tests.support import result, spec

_PEER = OperationPeerHandle("peer", TrustedPeerSpec("peer", "p-1", "inproc://p-1"))


def sealed_text(random_: random.Random, longest: int) -> str:
    """A text of a random length that shows whether it is whole."""
    body = random_.randbytes(random_.randrange(longest)).hex()
    return f"{hashlib.sha256(body.encode()).hexdigest()}:{body}"


def is_whole(text: str) -> bool:
    """Whether `sealed_text` made this text, and it is whole."""
    digest, _, body = text.partition(":")
    return digest == hashlib.sha256(body.encode()).hexdigest()


def text_of(entry: CompletionEntry) -> str:
    """The text that an entry's outcome carries."""
    outcome = entry.terminal_outcome
    for name in ("error", "reason"):
        if hasattr(outcome, name):
            return str(getattr(outcome, name))
    return str(outcome.result.content) if hasattr(outcome, "result") else ""


def obeys_the_feed(batch: CompletionBatch, after: int) -> None:
    """FEED-1: no entry is above the watermark, and there is no hole above `dropped_through`."""
    first = max(after, batch.dropped_through) + 1
    assert [entry.seq for entry in batch.entries] == list(range(first, batch.watermark + 1))


def one_entry_each(entries: Sequence[CompletionEntry]) -> None:
    """No operation ended twice."""
    ids = [entry.operation_id for entry in entries]
    assert len(set(ids)) == len(ids)


def one_operation(registry: RuntimeOpsLifecycleRegistry, random_: random.Random) -> OperationId:
    """Register an operation and lead it to a random end."""
    id = OperationId.new()
    kind = random_.choice(list(OperationKind))
    registry.register_operation(spec("work", kind=kind, id=id))
    text = sealed_text(random_, 60)
    if random_.random() < 0.2:
        if random_.random() < 0.5:
            registry.provisioning_failed(id, text)
        else:
            registry.abort_provisioning(id, text)
        return id
    registry.provisioning_succeeded(id)
    for number in range(random_.randrange(3)):
        registry.report_progress(id, OperationProgressUpdate(f"step {number}"))
    if kind is OperationKind.MOB_MEMBER_CHILD and random_.random() < 0.5:
        registry.peer_ready(id, _PEER)
    if random_.random() < 0.3:
        registry.request_retire(id)
    match random_.randrange(4):
        case 0:
            registry.fail_operation(id, text)
        case 1:
            registry.cancel_operation(id, text)
        case 2:
            registry.mark_retired(id)
        case _:
            registry.complete_operation(id, result(id, text))
    return id


def several_operations(registry: RuntimeOpsLifecycleRegistry, random_: random.Random) -> None:
    """Lead some operations through their lives together."""
    specs = [spec("together") for _ in range(random_.randrange(1, 6))]
    registry.register_operations(specs)
    registry.start_operations(each.id for each in specs)
    registry.complete_operations(result(each.id, sealed_text(random_, 60)) for each in specs)


def work_for_ever(bindings: SessionRuntimeBindings, test: Channel, seed: int) -> None:
    """A worker that runs a few operations at a time, some of others, until it is killed."""
    random_ = random.Random(seed)
    registry = bindings.ops_lifecycle
    test.say("working")
    while True:
        with contextlib.suppress(InvalidTransition, NotFound, MaxConcurrentExceeded):
            match random_.randrange(8):
                case 0:  # left running, until its death or another worker's case 1
                    id = OperationId.new()
                    registry.register_operation(spec("left", id=id))
                    registry.provisioning_succeeded(id)
                case 1:
                    running = registry.list_operations()
                    live = [one.id for one in running if not one.status.is_terminal]
                    if live:
                        registry.cancel_operation(random_.choice(live), sealed_text(random_, 40))
                case 2:
                    feed = registry.completion_feed()
                    after = random_.randrange(feed.watermark() + 1)
                    obeys_the_feed(feed.list_since(after), after)
                case 3:
                    with registry.register_watcher(one_operation(registry, random_)) as watch:
                        watch.wait(60)
                case 4:
                    several_operations(registry, random_)
                case _:
                    one_operation(registry, random_)
