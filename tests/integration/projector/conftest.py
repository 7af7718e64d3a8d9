"""The projector's pauses, shortened: they are there to save a server work, and a test waits for each of them."""

from __future__ import annotations

import pytest

from projector import loop, stream

__all__ = ["brisk"]


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "WAIT_MS", 50)
    monkeypatch.setattr(loop, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(loop, "COMMAND_SECONDS", 0.1)
