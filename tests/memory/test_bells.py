"""Bells: coroutines that wait for any number of epochs, served by one thread."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from shmepoch import (
    OpsLifecycleConfig,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
)
from shmepoch.errors import SharedMemoryExhausted
from shmepoch.memory import bells as bells_module
from shmepoch.memory.bells import Bells, bells_path, remove_unused_bells
from shmepoch.memory.files import SHM_DIR, map_shared, open_owned
from tests.processes.children import Channel, start
from tests.runtime.completions import TOOL, end
from tests.support import eventually

SMALL = OpsLifecycleConfig(
    max_completed=1, max_operations=1, feed_bytes=8 * 1024, max_participants=8
)
RETIRED_AT = 0


@pytest.fixture
def adapter(namespace: str) -> Iterator[RuntimeSessionAdapter]:
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=SMALL) as adapter:
        yield adapter


@pytest.fixture
def bindings(adapter: RuntimeSessionAdapter) -> Iterator[SessionRuntimeBindings]:
    bindings = adapter.prepare_bindings(SessionId.new())
    yield bindings
    adapter.unregister_session(bindings.session_id)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def listeners() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shmepoch-bells"]


async def advanced(bindings: SessionRuntimeBindings, after: int = 0) -> int:
    return await bindings.ops_lifecycle.completion_feed().advanced(after)


# --- one thread -------------------------------------------------------------------------------


def end_in(bindings: list[SessionRuntimeBindings], test: Channel) -> None:
    """End an operation in each epoch, when told to."""
    test.hear()
    for one in bindings:
        end(one, TOOL)


def test_one_thread_serves_coroutines_of_many_epochs(adapter: RuntimeSessionAdapter) -> None:
    epochs = [adapter.prepare_bindings(SessionId.new()) for _ in range(150)]

    async def wait_for_all() -> list[int]:
        waits = [asyncio.ensure_future(advanced(one)) for one in epochs for _ in range(3)]
        await asyncio.sleep(0)
        assert len(listeners()) == 1
        child.say("end them")
        return list(await asyncio.gather(*waits))

    with start(end_in, epochs, method="fork") as child:  # type: ignore[arg-type]
        assert run(wait_for_all()) == [1] * 450
        child.result()
    for one in epochs:
        adapter.unregister_session(one.session_id)


def test_no_wait_starts_nothing(bindings: SessionRuntimeBindings, namespace: str) -> None:
    end(bindings, TOOL)
    assert run(advanced(bindings)) == 1
    assert listeners() == []
    assert not bells_path(namespace).exists()


def test_the_listener_ends_by_itself_and_takes_its_page_along(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    async def wait() -> None:
        waiting = asyncio.ensure_future(advanced(bindings))
        await asyncio.sleep(0)
        assert len(listeners()) == 1
        assert bells_path(namespace).exists()
        end(bindings, TOOL)
        await waiting

    run(wait())
    eventually(lambda: not listeners() and not bells_path(namespace).exists())
    for seq in range(1, 4):  # and starts again when needed
        run(_one_more(bindings, seq))


async def _one_more(bindings: SessionRuntimeBindings, after: int) -> None:
    waiting = asyncio.ensure_future(advanced(bindings, after))
    await asyncio.sleep(0)
    end(bindings, TOOL)
    assert await waiting == after + 1


# --- who waits --------------------------------------------------------------------------------


def test_many_event_loops_at_once(adapter: RuntimeSessionAdapter) -> None:
    epochs = [adapter.prepare_bindings(SessionId.new()) for _ in range(4)]
    seen: list[int] = []
    waiting = threading.Barrier(9)

    async def follow(bindings: SessionRuntimeBindings) -> None:
        first = asyncio.ensure_future(advanced(bindings))
        await asyncio.sleep(0)
        await asyncio.to_thread(waiting.wait)
        await first
        seen.append(await advanced(bindings, 1))

    threads = [threading.Thread(target=run, args=(follow(one),)) for one in epochs * 2]
    for thread in threads:
        thread.start()
    waiting.wait(60)
    assert len(listeners()) == 1
    for one in epochs * 2:
        end(one, TOOL)
    for thread in threads:
        thread.join(60)
    assert seen == [2] * 8
    for one in epochs:
        adapter.unregister_session(one.session_id)


def test_who_was_cancelled_is_forgotten(bindings: SessionRuntimeBindings, namespace: str) -> None:
    async def give_up() -> None:
        waits = [asyncio.ensure_future(advanced(bindings)) for _ in range(5)]
        await asyncio.sleep(0)
        for wait in waits[:4]:
            wait.cancel()
        gone = await asyncio.gather(*waits[:4], return_exceptions=True)
        assert all(isinstance(error, asyncio.CancelledError) for error in gone)
        assert len(Bells.of(namespace)._waits) == 1
        end(bindings, TOOL)
        assert await waits[4] == 1

    run(give_up())
    assert Bells.of(namespace)._waits == set()
    eventually(lambda: not listeners())


def test_a_timeout_is_a_cancellation(bindings: SessionRuntimeBindings, namespace: str) -> None:
    async def time_out() -> None:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(advanced(bindings), 0.01)

    run(time_out())
    assert Bells.of(namespace)._waits == set()


def test_a_loop_that_was_closed_while_it_waited_is_no_trouble(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(advanced(bindings))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    end(bindings, TOOL)
    eventually(lambda: not listeners())
    assert not waiting.done()
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]
    waiting.get_coro().close()
    assert run(advanced(bindings)) == 1


def wait_and_exit(bindings: SessionRuntimeBindings, test: Channel) -> None:
    """Wait in a thread that is not waited for, and end."""
    thread = threading.Thread(target=lambda: asyncio.run(advanced(bindings)), daemon=True)
    thread.start()
    while not Bells.of(bindings.shared_segment().namespace)._waits:
        pass
    test.say("waiting")


def test_a_process_that_ends_while_it_waits_takes_its_page_along(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    with start(wait_and_exit, bindings, method="subprocess") as child:
        assert child.hear() == "waiting"
        assert child.hear() is None
        assert child.join() == 0
    assert not bells_path(namespace).exists()


def test_ctrl_c_reaches_who_waits(bindings: SessionRuntimeBindings) -> None:
    script = (
        "import asyncio, os, signal, sys\n"
        "from shmepoch import SessionRuntimeBindings\n"
        "bindings = SessionRuntimeBindings.from_token(sys.argv[1])\n"
        "async def main():\n"
        "    asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)\n"
        "    await bindings.ops_lifecycle.completion_feed().advanced(0)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, bindings.to_token()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "KeyboardInterrupt" in done.stderr


# --- the page ---------------------------------------------------------------------------------


def wait_for_ever(bindings: SessionRuntimeBindings, test: Channel) -> None:
    async def wait() -> None:
        waiting = asyncio.ensure_future(advanced(bindings, 10_000))
        await asyncio.sleep(0)
        test.say("waiting")
        await waiting

    asyncio.run(wait())


def leave_a_page(bindings: SessionRuntimeBindings, namespace: str) -> int:
    """Have a listener killed; the inode of the page that it left."""
    with start(wait_for_ever, bindings) as child:
        assert child.hear() == "waiting"
        child.kill()
    return bells_path(namespace).stat().st_ino


async def wait_and_end(bindings: SessionRuntimeBindings, after: int, namespace: str) -> int:
    """Wait while an operation ends; the inode of the page meanwhile."""
    waiting = asyncio.ensure_future(advanced(bindings, after))
    await asyncio.sleep(0)
    inode = bells_path(namespace).stat().st_ino
    end(bindings, TOOL)
    await waiting
    return inode


def test_a_page_that_a_killed_listener_left_is_taken_over(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    left = leave_a_page(bindings, namespace)
    assert run(wait_and_end(bindings, 0, namespace)) == left
    eventually(lambda: not bells_path(namespace).exists())


def test_a_page_that_a_killed_listener_left_is_removed(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    leave_a_page(bindings, namespace)
    remove_unused_bells(namespace)
    assert not bells_path(namespace).exists()
    remove_unused_bells(namespace)


def test_a_page_that_is_listened_to_is_not_removed(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    with start(wait_for_ever, bindings) as child:
        assert child.hear() == "waiting"
        remove_unused_bells(namespace)
        assert bells_path(namespace).exists()
        child.kill()


def retire(namespace: str) -> None:
    """Do half of a removal: who did this was killed before the other half."""
    fd = open_owned(bells_path(namespace))
    map_shared(fd, 4096).store(RETIRED_AT, 1)
    fd.close()


def test_a_page_that_is_being_removed_is_replaced(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    left = leave_a_page(bindings, namespace)
    retire(namespace)
    assert run(wait_and_end(bindings, 0, namespace)) != left


def ring_now_and_then(bindings: SessionRuntimeBindings, test: Channel) -> None:
    """End an operation each time that it is told to; it keeps its page of bells in between."""
    while test.hear():
        end(bindings, TOOL)


def test_a_writer_that_has_an_old_page_rings_the_new_one(
    bindings: SessionRuntimeBindings, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bells_module, "_RECHECK_NS", 50_000_000_000)  # only a bell wakes it
    feed = bindings.ops_lifecycle.completion_feed()

    async def wait(after: int) -> None:
        waiting = asyncio.ensure_future(advanced(bindings, after))
        await asyncio.sleep(0)
        writer.say(True)
        assert await waiting == after + 1

    with start(ring_now_and_then, bindings, method="spawn") as writer:
        for after in range(4):
            asyncio.run(asyncio.wait_for(wait(after), 30))
            Bells.of(namespace).stop()
            assert not bells_path(namespace).exists()
        writer.say(True)  # nobody listens
        feed.wait_for_advance(4, 60)
        writer.say(False)
        writer.result()


def test_a_wait_without_room_for_the_page_is_refused_and_forgotten(
    bindings: SessionRuntimeBindings, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(size: int) -> int:
        raise SharedMemoryExhausted(size, 0, str(SHM_DIR))

    with monkeypatch.context() as full:
        full.setattr(bells_module, "create_unnamed", no_room)
        with pytest.raises(SharedMemoryExhausted):
            run(advanced(bindings))
    assert Bells.of(namespace)._waits == set()
    run(_one_more(bindings, 0))


# --- coming and going -------------------------------------------------------------------------


def come_and_go(bindings: SessionRuntimeBindings, test: Channel, rounds: int) -> int:
    """Listen for one completion at a time, and stop listening after each."""
    namespace, position = bindings.shared_segment().namespace, 0
    for _ in range(rounds):
        position = asyncio.run(advanced(bindings, position))
        Bells.of(namespace).stop()
    return position


def test_listeners_that_come_and_go_miss_nothing(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    with (
        start(come_and_go, bindings, 40) as first,
        start(come_and_go, bindings, 40) as second,
        start(come_and_go, bindings, 40) as third,
    ):
        children = [first, second, third]
        while any(child.silent for child in children):
            end(bindings, TOOL)
        for child in children:
            assert child.result() >= 40
    remove_unused_bells(namespace)
    assert not bells_path(namespace).exists()
