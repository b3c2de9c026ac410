"""The log of the command on standard error: lines for people, or JSON for machines."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

import msgspec

from shmepoch.cli import streams

#: The attributes that every record has. A record's other attributes are the fields of its event.
_ORDINARY: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class Level(StrEnum):
    """The least severe records that are shown. Errors always are."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Log(msgspec.Struct, frozen=True):
    """The part of the log that is shown, and its format."""

    level: Level = Level.ERROR
    json: bool = False

    def configure(self) -> None:
        """Show what this process logs from now on."""
        global _configured
        handler = logging.StreamHandler()
        handler.setFormatter(_Json() if self.json else _Text("shmepoch: %(message)s"))
        logging.basicConfig(level=self.level.upper(), handlers=[handler], force=True)
        _configured = self


_configured = Log()


def configured() -> Log:
    """The last configuration, for processes that this one starts."""
    return _configured


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return streams.visible(super().format(record))


class _Json(logging.Formatter):
    """A record as one JSON object, in ASCII, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        fields |= {name: one for name, one in vars(record).items() if name not in _ORDINARY}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, separators=(",", ":"), default=str)
