"""Epochs to test, of every implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeAlias

import pytest

from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.cursors import EpochCursorState
from shmepoch.epoch.feed import SegmentFeed
from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from tests.epoch.implementations import IMPLEMENTATIONS, Epoch

MakeEpoch: TypeAlias = Callable[..., Epoch]


@pytest.fixture(params=IMPLEMENTATIONS)
def make_epoch(request: pytest.FixtureRequest, namespace: str) -> Iterator[MakeEpoch]:
    """Makes epochs of one implementation, sized by the keywords of `OpsLifecycleConfig`.

    After any end of a test, every epoch that it made is consistent.
    """
    with ExitStack() as made:

        def make(**sizes: int) -> Epoch:
            config = OpsLifecycleConfig(**sizes) if sizes else None
            epoch = made.enter_context(IMPLEMENTATIONS[request.param](namespace, config))
            made.callback(epoch.registry.check)
            return epoch

        yield make


@pytest.fixture
def epoch(make_epoch: MakeEpoch) -> Epoch:
    return make_epoch()


@pytest.fixture
def registry(epoch: Epoch) -> RuntimeOpsLifecycleRegistry:
    return epoch.registry


@pytest.fixture
def feed(registry: RuntimeOpsLifecycleRegistry) -> SegmentFeed:
    return registry.completion_feed()


@pytest.fixture
def cursors(epoch: Epoch) -> EpochCursorState:
    return epoch.cursors
