"""A runtime, its agent, and one worker process."""

from multiprocessing import Process

import shmepoch


def work(bindings: shmepoch.SessionRuntimeBindings) -> None:
    with bindings.operation("index the repository") as operation:
        operation.complete("1,204 files")


if __name__ == "__main__":
    with shmepoch.RuntimeSessionAdapter.ephemeral() as runtime:
        bindings = runtime.prepare_bindings(shmepoch.SessionId.new())
        agent = shmepoch.AgentFactory().build(bindings.session_id, shmepoch.SessionOwned(bindings))
        Process(target=work, args=(bindings,)).start()
        with agent.wait() as notices:
            print(*(notice.text for notice in notices))
        runtime.unregister_session(bindings.session_id)
