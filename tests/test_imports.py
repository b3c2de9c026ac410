"""The library is whole once it is imported: it imports no part of it later.

A process may give up its rights, change its root or run out of descriptors after that, and finds no
module any more. Only numpy, for monitors, is imported by its first use.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.support import segments_in

_PROGRAM: Final = """
import sys
from shmepoch import *

finders, sys.meta_path[:] = list(sys.meta_path), []  # nothing is found any more
with RuntimeSessionAdapter.persistent(SqliteRuntimeStore(sys.argv[1])) as adapter:
    bindings = adapter.prepare_bindings(SessionId.new())
    registry = bindings.ops_lifecycle
    agent = AgentFactory().build(bindings.session_id, SessionOwned(bindings))
    woken = []
    with RuntimeLoop(bindings, inject=lambda _: not woken.append(1), quiescent=lambda: True):
        with bindings.operation("work") as operation:
            watch = registry.register_watcher(operation.id)
            operation.progress("on it", percent=50)
            operation.complete("done")
        assert watch.wait(20).text == "done"
        registry.completion_feed().wait_durable(1, 20)
        while not woken:
            pass
    with agent.wait(20) as notices:
        assert [notice.text for notice in notices] == ["work completed: done"]
    observed = observe_session(bindings.session_id)
    assert observed.ops_lifecycle.list_operations() and observed.participants()
    observed.close()
    registry.check()
    try:
        SessionRuntimeBindings.from_token("nonsense")
    except TokenInvalid:
        pass
    adapter.reset_session(bindings.session_id)
    adapter.unregister_session(bindings.session_id)
sys.meta_path[:] = finders  # for the interpreter's own at its end
"""


def test_nothing_is_imported_later(namespace: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "store.db")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert segments_in(namespace) == []
