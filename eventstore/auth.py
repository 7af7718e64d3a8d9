"""Bearer tokens from a file, which may be replaced while the process runs."""

from __future__ import annotations

import hmac
import time
from typing import TYPE_CHECKING, Final

import structlog

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Tokens", "TokensMissingError"]

_log = structlog.get_logger(__name__)

CHECK_SECONDS: Final = 1.0
"""How often the file is asked whether it changed: a rotation may take that long, a request never costs a system call."""


class TokensMissingError(RuntimeError):
    """The token file is not readable or has no token in it."""


class Tokens:
    """The accepted tokens, one a line: two of them while callers change from the old to the new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[float, int, int] | None = None
        self._tokens: tuple[bytes, ...] = ()
        self._checked = 0.0
        self._read()
        if not self._tokens:
            raise TokensMissingError(f"{path} has no token")

    def accept(self, authorization: str | None) -> bool:
        """Whether an `Authorization` header carries an accepted token. Takes the same time for every wrong one."""
        now = time.monotonic()
        if now - self._checked >= CHECK_SECONDS:
            self._checked = now
            self._refresh()
        scheme, _, token = (authorization or "").partition(" ")
        given = token.strip().encode("utf-8", "surrogateescape")
        matches = [hmac.compare_digest(given, accepted) for accepted in self._tokens]
        return scheme.lower() == "bearer" and any(matches)

    def _refresh(self) -> None:
        try:
            self._read()
        except TokensMissingError as error:
            _log.warning("token_file_unreadable", error=str(error))  # the tokens at hand stay good

    def _read(self) -> None:
        try:
            status = self._path.stat()
            stamp = (status.st_mtime, status.st_size, status.st_ino)
            if stamp == self._stamp:
                return
            tokens = tuple(line.strip().encode() for line in self._path.read_text().splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise TokensMissingError(f"{self._path}: {error}") from error
        if tokens:
            if self._stamp is not None:
                _log.info("tokens_replaced", tokens=len(tokens))
            self._tokens = tokens
        self._stamp = stamp
