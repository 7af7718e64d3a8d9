"""The projector's pauses, shortened: they are there to save a server work, and a test waits for each of them."""

from __future__ import annotations

import pytest

from projector import loop, scan, scans, stream

__all__ = ["brisk", "tiny_scans"]


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "WAIT_MS", 50)
    monkeypatch.setattr(loop, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(loop, "COMMAND_SECONDS", 0.1)


@pytest.fixture
def tiny_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches so small that a handful of events meets every border."""
    for name, value in (("READ_EVENTS", 3), ("WRITE_DOCUMENTS", 2), ("WRITE_EVENTS", 5)):
        monkeypatch.setattr(scan, name, value)
    monkeypatch.setattr(scans, "RANGE_EVENTS", 10)
