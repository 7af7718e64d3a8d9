"""How far a partition is: what its loop notes, and status, metrics and the cut-over read."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from projector.parking import Parked
    from projector.position import Position

__all__ = ["Progress"]


@dataclass(slots=True)
class Progress:
    """How far a partition is, for status and metrics."""

    state: str = "catching_up"
    """One of `projector.metrics.HEALTH_STATES`."""
    caught_up: bool = False
    """Everything that the stream has brought is written, and it stood at the log's end when it was last asked."""
    position: Position | None = None
    """Everything before it is in the read model."""
    checkpoint: Position | None = None
    """Where the partition would resume now."""
    heartbeat: float = field(default_factory=time.time)
    error: str | None = None
    density: float = 0.0
    """Events that the stream brought per second of the log's time, lately: to estimate how many are still to come."""
    pending: int = 0
    """Events that wait for the writer."""
    aside: Mapping[str, Parked] = field(default_factory=dict)
    """The aggregates that are set aside."""

    def lag_seconds(self) -> float:
        """0 when caught up, else the age of the oldest event that may not have been applied yet."""
        if self.caught_up or self.position is None:
            return 0.0
        return max(0.0, time.time() - self.position.cluster_time.time)

    def backlog_events(self) -> int:
        """An estimate of the events not applied yet: those that wait, and those that the lag stands for."""
        if self.caught_up:
            return self.pending
        return max(1, self.pending, round(self.density * self.lag_seconds()))
