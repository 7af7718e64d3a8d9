"""Projections for processes of the tests: `projector run --module tests.projected`."""

from __future__ import annotations

from tests.projecting import ledger, rooms

__all__ = ["LEDGER", "ROOMS"]

LEDGER = ledger()
ROOMS = rooms()
