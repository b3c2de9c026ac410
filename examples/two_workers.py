"""A runtime, its agent, and two worker processes of a pool."""

from concurrent.futures import ProcessPoolExecutor

import shmepoch


def work(bindings: shmepoch.SessionRuntimeBindings, path: str) -> None:
    with bindings.operation(f"index {path}") as operation:
        operation.complete(f"indexed {path}")


if __name__ == "__main__":
    with shmepoch.RuntimeSessionAdapter.ephemeral() as runtime, ProcessPoolExecutor(2) as pool:
        bindings = runtime.prepare_bindings(shmepoch.SessionId.new())
        agent = shmepoch.AgentFactory().build(bindings.session_id, shmepoch.SessionOwned(bindings))
        running = [pool.submit(work, bindings, path) for path in ("src", "docs")]
        while running:
            with agent.wait() as notices:
                for notice in notices:
                    print(notice.text)
                    running.pop()
        runtime.unregister_session(bindings.session_id)
