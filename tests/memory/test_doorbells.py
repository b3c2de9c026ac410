"""Doorbells: coroutines that wait for any number of epochs, served by one thread."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from shmepoch import (
    OpsLifecycleConfig,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
)
from shmepoch import _native as at
from shmepoch._native import Memory
from shmepoch.errors import SharedMemoryExhausted
from shmepoch.memory import doorbells as doorbells_module
from shmepoch.memory import waiting as waiting_module
from shmepoch.memory.doorbells import Doorbells, doorbells_path, remove_unused_doorbells
from shmepoch.memory.files import SHM_DIR, NewFile, map_shared, open_owned
from shmepoch.memory.waiting import AsyncWait, LocalWaits
from tests.processes.children import Channel, start, wait_until
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
    return [thread for thread in threading.enumerate() if thread.name == "shmepoch-doorbells"]


def hears(namespace: str) -> bool:
    """Whether this process has joined the listeners of a page."""
    return Doorbells.of(namespace)._fd is not None


async def advanced(bindings: SessionRuntimeBindings, after: int = 0) -> int:
    return await bindings.ops_lifecycle.completion_feed().advanced(after)


# --- one thread -------------------------------------------------------------------------------


def end_in(bindings: list[SessionRuntimeBindings], test: Channel) -> None:
    """End an operation in each epoch, on request."""
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
    assert not doorbells_path(namespace).exists()


def test_the_listener_ends_by_itself_and_takes_its_page_along(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    async def wait() -> None:
        waiting = asyncio.ensure_future(advanced(bindings))
        await asyncio.sleep(0)
        assert len(listeners()) == 1
        eventually(doorbells_path(namespace).exists)
        end(bindings, TOOL)
        await waiting

    run(wait())
    eventually(lambda: not listeners() and not doorbells_path(namespace).exists())
    for seq in range(1, 4):  # and starts again when needed
        run(_one_more(bindings, seq))


async def _one_more(bindings: SessionRuntimeBindings, after: int) -> None:
    waiting = asyncio.ensure_future(advanced(bindings, after))
    await asyncio.sleep(0)
    end(bindings, TOOL)
    assert await waiting == after + 1


# --- waiters ----------------------------------------------------------------------------------


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
        assert len(Doorbells.of(namespace)._waits) == 1
        end(bindings, TOOL)
        assert await waits[4] == 1

    run(give_up())
    assert Doorbells.of(namespace)._waits == set()
    eventually(lambda: not listeners())


def test_a_timeout_is_a_cancellation(bindings: SessionRuntimeBindings, namespace: str) -> None:
    async def time_out() -> None:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(advanced(bindings), 0.01)

    run(time_out())
    assert Doorbells.of(namespace)._waits == set()


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
    """Wait in a daemon thread, and end."""
    thread = threading.Thread(target=lambda: asyncio.run(advanced(bindings)), daemon=True)
    thread.start()
    while not Doorbells.of(bindings.shared_segment().namespace)._waits:
        pass
    test.say("waiting")


def test_a_process_that_ends_while_it_waits_takes_its_page_along(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    with start(wait_and_exit, bindings, method="subprocess") as child:
        assert child.hear() == "waiting"
        assert child.hear() is None
        assert child.join() == 0
    assert not doorbells_path(namespace).exists()


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
        wait_until(lambda: hears(bindings.shared_segment().namespace))
        test.say("waiting")
        await waiting

    asyncio.run(wait())


def leave_a_page(bindings: SessionRuntimeBindings, namespace: str) -> int:
    """Kill a listener; returns the inode of the page that it left."""
    with start(wait_for_ever, bindings) as child:
        assert child.hear() == "waiting"
        child.kill()
    return doorbells_path(namespace).stat().st_ino


async def wait_and_end(bindings: SessionRuntimeBindings, after: int, namespace: str) -> int:
    """Wait while an operation ends; returns the inode of the page meanwhile."""
    waiting = asyncio.ensure_future(advanced(bindings, after))
    await asyncio.sleep(0)
    eventually(lambda: hears(namespace))
    inode = doorbells_path(namespace).stat().st_ino
    end(bindings, TOOL)
    await waiting
    return inode


def test_a_page_that_a_killed_listener_left_is_taken_over(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    left = leave_a_page(bindings, namespace)
    assert run(wait_and_end(bindings, 0, namespace)) == left
    eventually(lambda: not doorbells_path(namespace).exists())


def test_a_page_that_a_killed_listener_left_is_removed(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    leave_a_page(bindings, namespace)
    remove_unused_doorbells(namespace)
    assert not doorbells_path(namespace).exists()
    remove_unused_doorbells(namespace)


def test_a_page_that_is_listened_to_is_not_removed(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    with start(wait_for_ever, bindings) as child:
        assert child.hear() == "waiting"
        remove_unused_doorbells(namespace)
        assert doorbells_path(namespace).exists()
        child.kill()


def retire(namespace: str) -> None:
    """Do the first half of a removal, like a process that was killed before the second half."""
    fd = open_owned(doorbells_path(namespace))
    map_shared(fd, 4096).store(RETIRED_AT, 1)
    fd.close()


def test_a_writer_does_not_wait_for_a_page_that_is_left_to_go(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    leave_a_page(bindings, namespace)  # and the mark of its listener in the epoch
    retire(namespace)
    end(bindings, TOOL)
    assert run(advanced(bindings)) == 1
    remove_unused_doorbells(namespace)


def test_a_page_that_is_being_removed_is_replaced(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    left = leave_a_page(bindings, namespace)
    retire(namespace)
    assert run(wait_and_end(bindings, 0, namespace)) != left


def ring_now_and_then(bindings: SessionRuntimeBindings, test: Channel) -> None:
    """End an operation on each request; keep the page of doorbells in between."""
    while test.hear():
        end(bindings, TOOL)


def test_a_writer_that_has_an_old_page_rings_the_new_one(
    bindings: SessionRuntimeBindings, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorbells_module, "_RECHECK_NS", 50_000_000_000)  # only a doorbell wakes it
    feed = bindings.ops_lifecycle.completion_feed()

    async def wait(after: int) -> None:
        waiting = asyncio.ensure_future(advanced(bindings, after))
        await asyncio.sleep(0)
        eventually(lambda: hears(namespace))
        writer.say(True)
        assert await waiting == after + 1

    with start(ring_now_and_then, bindings, method="spawn") as writer:
        for after in range(4):
            asyncio.run(asyncio.wait_for(wait(after), 30))
            Doorbells.of(namespace).stop()
            assert not doorbells_path(namespace).exists()
        writer.say(True)  # no process listens
        feed.wait_for_advance(4, 60)
        writer.say(False)
        writer.result()


def test_a_wait_without_room_for_a_page_looks_by_itself(
    bindings: SessionRuntimeBindings, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(path: Path, size: int) -> NewFile:
        raise SharedMemoryExhausted(size, 0, str(SHM_DIR))

    with monkeypatch.context() as full:
        full.setattr(doorbells_module, "NewFile", no_room)
        run(_one_more(bindings, 0))
        assert not doorbells_path(namespace).exists()
        run(_one_more(bindings, 1))

    async def hear_again() -> None:
        waiting = asyncio.ensure_future(advanced(bindings, 2))
        await asyncio.sleep(0)
        eventually(lambda: hears(namespace))  # when there is room
        end(bindings, TOOL)
        await waiting

    run(hear_again())


def test_a_page_that_lost_its_name_is_made_anew(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    async def wait() -> None:
        waiting = asyncio.ensure_future(advanced(bindings))
        await asyncio.sleep(0)
        eventually(lambda: hears(namespace))
        doorbells_path(namespace).unlink()
        eventually(doorbells_path(namespace).exists)
        end(bindings, TOOL)
        assert await waiting == 1

    run(wait())


# --- other files with the page's name ------------------------------------------------------------


def put_sparse(path: Path) -> None:
    """Make a file as long as a page, without reserved memory."""
    with path.open("wb") as file:
        file.truncate(4096)


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    path.write_bytes(bytes(4096))
    path.chmod(0o600)
    os.chown(path, 65534, 65534)


IN_ITS_PLACE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.touch(0o600),
    "short": lambda path: path.write_bytes(bytes(5)),
    "long": lambda path: path.write_bytes(bytes(5 * 4096)),
    "noise": lambda path: path.write_bytes(b"\xff" * 4096),
    "sparse": put_sparse,
    "readable by others": lambda path: path.touch(0o644),
    "directory": lambda path: path.mkdir(),
    "symbolic link": lambda path: path.symlink_to("/dev/null"),
    "pipe": lambda path: os.mkfifo(path, 0o600),
    "another user's": give_away,
}
#: Regular files of this user alone are replaced.
REPLACED = {"empty", "short", "long", "noise", "sparse"}


@pytest.mark.parametrize("what", IN_ITS_PLACE)
def test_what_is_in_the_place_of_a_page_stops_neither_waits_nor_writers(
    bindings: SessionRuntimeBindings, namespace: str, what: str
) -> None:
    path = doorbells_path(namespace)
    before = os.umask(0)
    try:
        IN_ITS_PLACE[what](path)
    finally:
        os.umask(before)
    if what in REPLACED:
        path.chmod(0o600)
    bindings.shared_segment().memory.fetch_or(at.DOORBELLS_AT, 2**32 - 1)
    end(bindings, TOOL)  # a writer finds it first
    run(_one_more(bindings, 1))
    run(_one_more(bindings, 2))
    eventually(lambda: not listeners())
    remove_unused_doorbells(namespace)
    assert path.exists() != (what in REPLACED)
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("what", sorted(REPLACED))
def test_what_is_no_page_is_replaced_by_one(
    bindings: SessionRuntimeBindings, namespace: str, what: str
) -> None:
    """Using it would work only as long as there is room."""
    path = doorbells_path(namespace)
    IN_ITS_PLACE[what](path)
    path.chmod(0o600)
    with path.open("rb") as put:  # so that its inode is not reused
        assert run(wait_and_end(bindings, 0, namespace)) != os.fstat(put.fileno()).st_ino
    eventually(lambda: not path.exists())


# --- stopped or killed between any two steps ------------------------------------------------------

STEPS = ("open_owned", "NewFile", "publish", "map_shared", "try_lock", "unlink")


def owner_of(step: str) -> Any:
    return NewFile if step == "publish" else doorbells_module


def stand_still() -> None:
    # To this thread: a signal to the process may let this thread run a little further.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def listen_and_stop(
    bindings: SessionRuntimeBindings, test: Channel, step: str, after: bool, times: int
) -> None:
    """Listen, and stop listening; be stopped before or after one step of it."""
    owner = owner_of(step)
    do, left = getattr(owner, step), times

    def stop_there(*args: object) -> object:
        nonlocal left
        left -= 1
        if left == 0 and not after:
            stand_still()
        done = do(*args)
        if left == 0 and after:
            stand_still()
        return done

    setattr(owner, step, stop_there)
    position = asyncio.run(advanced(bindings))
    Doorbells.of(bindings.shared_segment().namespace).stop()
    test.say(position)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_others_go_on_though_a_process_stands_still_in_the_middle(
    bindings: SessionRuntimeBindings, namespace: str, step: str, after: bool, times: int
) -> None:
    def heard_or_stopped() -> bool:
        return child.stopped() or not child.silent

    with start(listen_and_stop, bindings, step, after, times, method="fork") as child:
        eventually(lambda: child.stopped() or doorbells_path(namespace).exists())
        end(bindings, TOOL)
        eventually(heard_or_stopped)
        for seq in range(1, 4):
            run(_one_more(bindings, seq))
        child.signal(signal.SIGCONT)
        for seq in range(4, 6):  # while the other one uses a page that is gone
            run(_one_more(bindings, seq))
        assert child.hear() >= 1
    remove_unused_doorbells(namespace)
    eventually(lambda: not listeners() and not doorbells_path(namespace).exists())


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_others_go_on_though_a_process_is_killed_in_the_middle(
    bindings: SessionRuntimeBindings, namespace: str, step: str, after: bool
) -> None:
    with start(listen_and_stop, bindings, step, after, 1, method="fork") as child:
        eventually(lambda: child.stopped() or doorbells_path(namespace).exists())
        end(bindings, TOOL)
        eventually(lambda: child.stopped() or not child.silent)
        child.kill()
    for seq in range(1, 4):
        run(_one_more(bindings, seq))
    eventually(lambda: not listeners() and not doorbells_path(namespace).exists())


def wait_in_the_child(
    bindings: SessionRuntimeBindings, test: Channel, go_on: threading.Event
) -> tuple[list[str], int]:
    """The pages of doorbells that it inherited, and the result of its own wait."""
    go_on.set()  # the step is patched in this process, too
    inherited = [file for file in open_files() if ".doorbells" in file]
    position = asyncio.run(_wait_here(bindings))
    Doorbells.of(bindings.shared_segment().namespace).stop()
    return inherited, position


async def _wait_here(bindings: SessionRuntimeBindings) -> int:
    waiting = asyncio.ensure_future(advanced(bindings))
    await asyncio.sleep(0)
    end(bindings, TOOL)
    return int(await asyncio.wait_for(waiting, 30))


def open_files() -> list[str]:
    with os.scandir("/proc/self/fd") as entries:
        return [os.readlink(entry.path) for entry in entries]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", [step for step in STEPS if step != "unlink"])
def test_a_child_that_is_forked_while_a_thread_joins_waits_for_itself(
    bindings: SessionRuntimeBindings, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    owner = owner_of(step)
    do, reached, go_on = getattr(owner, step), threading.Event(), threading.Event()

    def wait_there(*args: object) -> object:
        def pause() -> None:
            reached.set()
            go_on.wait(60)

        if not after:
            pause()
        try:
            return do(*args)
        finally:
            if after:
                pause()

    monkeypatch.setattr(owner, step, wait_there)

    async def wait() -> None:
        waiting = asyncio.ensure_future(advanced(bindings))
        await asyncio.sleep(0)
        assert reached.wait(60)
        try:
            with start(wait_in_the_child, bindings, go_on, method="fork") as child:
                assert child.result() == ([], 1)
        finally:
            go_on.set()
        assert await waiting == 1

    run(wait())
    eventually(lambda: not listeners())


# --- without a thread, without descriptors, at the end ------------------------------------------


def no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_waits_go_on_without_a_thread_and_after_it(
    bindings: SessionRuntimeBindings, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptors = set(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", no_thread)
        for seq in range(3):
            run(_one_more(bindings, seq))
        assert set(os.listdir("/proc/self/fd")) == descriptors
    assert listeners() == []

    async def wait() -> None:
        waiting = asyncio.ensure_future(advanced(bindings, 3))
        await asyncio.sleep(0)
        assert len(listeners()) == 1
        end(bindings, TOOL)
        await waiting

    run(wait())


def end_without_descriptors(bindings: SessionRuntimeBindings, test: Channel) -> str:
    """End operations in a process that cannot open anything more."""
    end(bindings, TOOL)  # so that lazy attributes exist
    test.hear()
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with pytest.raises(OSError, match="Too many"):
        os.open("/dev/null", os.O_RDONLY)
    end(bindings, TOOL)
    return "committed"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_commit_that_cannot_be_told_is_a_commit(
    bindings: SessionRuntimeBindings, namespace: str, method: str
) -> None:
    async def wait() -> None:
        waiting = asyncio.ensure_future(advanced(bindings, 1))
        await asyncio.sleep(0)
        eventually(lambda: hears(namespace))
        writer.say("end one")
        assert await waiting == 2

    with start(end_without_descriptors, bindings, method=method) as writer:
        bindings.ops_lifecycle.completion_feed().wait_for_advance(0, 60)
        run(wait())
        assert writer.result() == "committed"


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "no more"), MemoryError(), ValueError()])
def test_what_fails_after_the_commit_is_logged_once(
    bindings: SessionRuntimeBindings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def fail(self: object, bits: int) -> None:
        raise error

    monkeypatch.setattr(waiting_module, "_reported", set())
    monkeypatch.setattr(Doorbells, "ring", fail)
    for _ in range(3):
        bindings.shared_segment().memory.fetch_or(at.DOORBELLS_AT, 1)
        end(bindings, TOOL)
        bindings.shared_segment().waiters.notify()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert type(error).__name__ in caplog.text


AT_THE_END = """
import atexit, asyncio, sys, threading

@atexit.register  # before that of shmepoch, so it runs after it
def wait_at_the_end():
    print(asyncio.run(asyncio.wait_for(wait_for_one(1), 30)))

from shmepoch import SessionRuntimeBindings
from tests.memory.test_doorbells import advanced
from tests.runtime.completions import TOOL, end
bindings = SessionRuntimeBindings.from_token(sys.argv[1])

async def wait_for_one(after):
    waiting = asyncio.ensure_future(advanced(bindings, after))
    await asyncio.sleep(0)
    end(bindings, TOOL)
    return await waiting

print(asyncio.run(wait_for_one(0)))
"""


def test_a_function_that_runs_at_exit_may_wait(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END, bindings.to_token()],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("1\n2\n", "", 0)
    assert not doorbells_path(namespace).exists()


# --- other code, at any moment -------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt_at(line: int) -> Callable[..., Any]:
    """A trace function that raises at the n-th line of the waiting modules, as a signal handler
    may."""
    files = {doorbells_module.__file__, waiting_module.__file__}
    left = line

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise Interrupted
        return trace

    return trace


@pytest.mark.parametrize("private", [False, True])
def test_a_wait_that_is_interrupted_at_any_line_harms_no_later_one(
    adapter: RuntimeSessionAdapter, namespace: str, private: bool
) -> None:
    session = SessionId.new()
    bindings = (
        SessionRuntimeBindings.standalone(session) if private else adapter.prepare_bindings(session)
    )

    async def interrupted(line: int, after: int) -> bool:
        waiting = asyncio.ensure_future(advanced(bindings, after))
        asyncio.get_running_loop().call_later(0.001, waiting.cancel)
        sys.settrace(interrupt_at(line))
        try:
            await waiting
        except Interrupted:
            return True
        except asyncio.CancelledError:
            return False
        finally:
            sys.settrace(None)
        raise AssertionError("nothing was committed")

    line, seq = 1, 0
    while run(interrupted(line, seq)):
        run(_one_more(bindings, seq))
        line, seq = line + 1, seq + 1
    assert line > 10
    if not private:
        eventually(lambda: not listeners())  # no wait of those is left
        adapter.unregister_session(session)


@pytest.mark.parametrize("private", [False, True])
def test_waits_that_the_garbage_collector_ends_block_nothing(
    adapter: RuntimeSessionAdapter, private: bool
) -> None:
    """Waits may end at any allocation, in the listening thread and in the middle of an addition."""
    session = SessionId.new()
    bindings = (
        SessionRuntimeBindings.standalone(session) if private else adapter.prepare_bindings(session)
    )

    def leave_waits(count: int) -> None:
        loop = asyncio.new_event_loop()
        for _ in range(count):
            task = loop.create_task(advanced(bindings, 10_000))
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for seq in range(10):
            leave_waits(5)
            run(_one_more(bindings, seq))
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    if not private:
        eventually(lambda: not listeners())
        adapter.unregister_session(session)


@pytest.mark.parametrize("private", [False, True])
def test_a_wait_that_ends_in_the_middle_of_an_addition_blocks_nothing(
    namespace: str, private: bool
) -> None:
    waits = LocalWaits() if private else Doorbells(doorbells_path(namespace))

    class Interrupted(set[AsyncWait]):
        def add(self, wait: AsyncWait) -> None:
            super().add(wait)
            waits.discard(ended[0])  # as a finalizer does

    ended: list[AsyncWait] = []
    waits._waits = Interrupted()

    async def wait() -> None:
        memory = Memory.private(at.PAGE)
        ended.append(AsyncWait(memory, 0))
        added = AsyncWait(memory, 0)
        waits.add(added)
        waits.discard(added)
        for each in (added, *ended):
            each.end()

    run(wait())
    if isinstance(waits, Doorbells):
        waits.stop()


# --- coming and going -------------------------------------------------------------------------


def come_and_go(bindings: SessionRuntimeBindings, test: Channel, rounds: int) -> int:
    """Listen for one completion at a time, and stop listening after each."""
    namespace, position = bindings.shared_segment().namespace, 0
    for _ in range(rounds):
        position = asyncio.run(advanced(bindings, position))
        Doorbells.of(namespace).stop()
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
    remove_unused_doorbells(namespace)
    assert not doorbells_path(namespace).exists()
