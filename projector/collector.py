"""Python's garbage collector in a process that folds: batches of events come and go, and almost nothing of them is in cycles."""

from __future__ import annotations

import gc
from typing import Final

__all__ = ["relax"]

_NEW_OBJECTS: Final = 50_000
"""Containers that come into being, less those that went, before the young are looked through. A batch has 10,000 to 20,000: at
Python's own 700 each is looked through some twenty times while it is decoded, which takes a third of the projector's time
(bench/README.md). At this number a handler that does make cycles holds a few MiB more; that is the cheaper mistake."""


def relax() -> None:
    """Has the collector look less often, and never again at what is there now (modules, projections). Once, at the start."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, 20, 50)
