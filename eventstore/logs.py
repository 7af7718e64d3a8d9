"""Logs: one JSON object a line on standard output, an event name and fields, no credentials.

Ours and the libraries' (pymongo, aiohttp, kopf, by the standard library's logging) go through the same processors.
Normal operation is silent: a line tells a change of state, never a single event (docs/ has the table of log events).
"""

from __future__ import annotations

import logging
import re
import sys
from typing import TYPE_CHECKING, Any, Final, Literal

import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger

__all__ = ["configure", "redact"]

_CREDENTIALS: Final = re.compile(r"(mongodb(?:\+srv)?://)[^/\s]*@")
"""Up to the last @ before the hosts' end: a password that was not escaped may hold one itself."""


def redact(text: str) -> str:
    """The text with user and password taken out of every MongoDB URI in it."""
    return _CREDENTIALS.sub(r"\1***@", text)


def _redact_line(_logger: WrappedLogger, _method: str, line: Any) -> str:
    """The last step, on the line as it is written: whatever a field was, a text, a list or an exception."""
    return redact(line)


def configure(component: str, level: str = "info", style: Literal["json", "console"] = "json") -> None:
    """Sets up structlog and the standard library's logging for the process; `component` is in every line."""

    def add_component(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("component", component)
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_component,
        structlog.processors.format_exc_info,
    ]
    renderer: Any = structlog.processors.JSONRenderer() if style == "json" else structlog.dev.ConsoleRenderer()
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer, _redact_line],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.getLogger("pymongo").setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
