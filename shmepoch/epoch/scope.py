"""An operation as a block of code: registered and started on entry, ended on exit."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import time
from collections.abc import Callable
from typing import Any, Final, Self, TypeVar, cast

from msgspec.structs import replace

from shmepoch.arguments import require, require_callable
from shmepoch.epoch.lifecycle import OpsLifecycleRegistry
from shmepoch.epoch.operations import (
    Cancelled,
    Failed,
    OperationProgressUpdate,
    OperationResult,
    OperationSpec,
)
from shmepoch.errors import PayloadTooLarge, ShmepochError
from shmepoch.events import Event, about
from shmepoch.ids import OperationId

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

_log = logging.getLogger(__name__)

#: The number of characters that are kept of an error's text if that does not fit the feed.
_SHORT_ERROR: Final = 300


class OperationScope:
    """One operation that this process runs, as a context manager, sync or async.

    Made by `SessionRuntimeBindings.operation`. Entering it registers the operation and starts it.
    Leaving it ends the operation:

    - without an exception, as `complete`, `fail` or `cancel` last said; else it is completed, with
      empty content;
    - after an `Exception` as failed, with the exception as the error;
    - after any other exception, such as a cancellation or Ctrl-C, as cancelled.

    The exception propagates. If another process ended the operation meanwhile, that end stands. A
    block that ends without an exception then raises `InvalidTransition` or `NotFound`. Content that
    does not fit the feed fails the operation and raises `PayloadTooLarge`. A scope is entered once.

    It also decorates a function, sync or async. Each call is an operation of its own; the text of
    the returned value is the content.

    `async with` waits for the writer lock in a thread, so that it does not block the event loop.
    """

    def __init__(self, registry: OpsLifecycleRegistry, spec: OperationSpec) -> None:
        self._registry: Final = registry
        self._spec: Final = spec
        self._began = 0.0
        self._result = OperationResult(id=spec.id, content="")
        self._ending: Failed | Cancelled | None = None

    @property
    def id(self) -> OperationId:
        """The operation's id."""
        return self._spec.id

    def progress(self, message: str, percent: float | None = None) -> None:
        """Report its progress; `percent` is 0 to 100 if it is known.

        Raises the errors of `report_progress`.
        """
        self._registry.report_progress(self.id, OperationProgressUpdate(message, percent))

    def complete(self, content: str = "", *, is_error: bool = False, tokens_used: int = 0) -> None:
        """Let it end as completed; `is_error` marks a tool's own failure.

        Its duration is the time from entering to leaving the block.
        """
        require(str, content, "OperationScope.complete", "content")
        self._ending = None
        self._result = replace(
            self._result, content=content, is_error=is_error, tokens_used=tokens_used
        )

    def fail(self, error: str) -> None:
        """Let it end as failed."""
        require(str, error, "OperationScope.fail", "error")
        self._ending = Failed(error)

    def cancel(self, reason: str | None = None) -> None:
        """Let it end as cancelled."""
        require(str | None, reason, "OperationScope.cancel", "reason")
        self._ending = Cancelled(reason)

    # --- as a context manager -----------------------------------------------------------------

    def __enter__(self) -> Self:
        self._registry.register_operation(self._spec)
        try:
            self._registry.provisioning_succeeded(self.id)
            self._began = time.monotonic()
        except BaseException as error:
            self._end_after(error)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._end_after(error)
        else:
            self._end()

    async def __aenter__(self) -> Self:
        try:
            return await _in_thread(self.__enter__)
        except asyncio.CancelledError as error:
            await _in_thread(functools.partial(self._end_after, error))
            raise

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        await _in_thread(functools.partial(self.__exit__, kind, error, traceback))

    def _end(self) -> None:
        match self._ending:
            case Failed(error):
                self._registry.fail_operation(self.id, error)
            case Cancelled(reason):
                self._registry.cancel_operation(self.id, reason)
            case None:
                duration_ms = round((time.monotonic() - self._began) * 1000)
                result = replace(self._result, duration_ms=duration_ms)
                try:
                    self._registry.complete_operation(self.id, result)
                except PayloadTooLarge as error:
                    self._end_after(error)
                    raise

    def _end_after(self, error: BaseException) -> None:
        """End it because of an exception, which has to reach the caller."""
        try:
            if not isinstance(error, Exception):
                self._registry.cancel_operation(self.id, type(error).__name__)
                return
            text = f"{type(error).__name__}: {error}"
            try:
                self._registry.fail_operation(self.id, text)
            except PayloadTooLarge:
                self._registry.fail_operation(self.id, f"{text[:_SHORT_ERROR]}...")
        except ShmepochError as second:  # another process ended it, or the epoch
            _log.info(
                "operation %s was not ended by its block: %s",
                self.id,
                second,
                extra=about(Event.OPERATION_NOT_ENDED, operation=str(self.id), reason=str(second)),
            )

    # --- as a decorator -----------------------------------------------------------------------

    def __call__(self, function: F) -> F:
        require_callable(function, "OperationScope", "function")
        if inspect.iscoroutinefunction(function):

            async def run_async(*args: Any, **kwargs: Any) -> Any:
                async with self._another() as operation:
                    returned = await function(*args, **kwargs)
                    operation.complete(_content(returned))
                return returned

            return cast(F, functools.wraps(function)(run_async))

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._another() as operation:
                returned = function(*args, **kwargs)
                operation.complete(_content(returned))
            return returned

        return cast(F, functools.wraps(function)(run))

    def _another(self) -> OperationScope:
        return OperationScope(self._registry, replace(self._spec, id=OperationId.new()))

    def __repr__(self) -> str:
        return f"OperationScope({self._spec.display_name!r}, id={self.id!r})"


def _content(returned: object) -> str:
    return "" if returned is None else str(returned)


async def _in_thread(call: Callable[[], T]) -> T:
    """Make a call in a thread. The call cannot be taken back, so a cancellation is raised once the
    call is over."""
    future = asyncio.get_running_loop().run_in_executor(None, call)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        future.exception()  # retrieved, so that asyncio does not log it
        raise cancelled
    return future.result()
