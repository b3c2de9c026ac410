"""iceoryx2's services, separate from those of the machine's other users."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import iceoryx2

from shmepoch.memory.files import SHM_DIR

_turn = count()


class Place:
    """The place of its nodes and services; everything in it is removed with `stack`."""

    def __init__(self, stack: ExitStack) -> None:
        iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
        prefix = f"bench{os.getpid()}-{next(_turn)}-"
        self._config: Any = iceoryx2.config.default()
        self._config.global_cfg.root_path = iceoryx2.Path.new(
            stack.enter_context(tempfile.TemporaryDirectory())
        )
        self._config.global_cfg.prefix = iceoryx2.FileName.new(prefix)
        stack.callback(_remove, prefix)

    def service(self, name: str) -> Any:
        """A builder of the service `name`, with a node of this process."""
        node = (
            iceoryx2.NodeBuilder.new()
            .config(self._config)
            .signal_handling_mode(iceoryx2.SignalHandlingMode.Disabled)
            .create(iceoryx2.ServiceType.Ipc)
        )
        return node.service_builder(iceoryx2.ServiceName.new(name))


def _remove(prefix: str) -> None:
    # Files of killed nodes: the processes of a measurement are killed.
    for path in Path(SHM_DIR).glob(f"{prefix}*"):
        path.unlink(missing_ok=True)
