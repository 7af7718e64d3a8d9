"""What the parts of a projector need of the process around them; the supervisor is all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pydantic import SecretStr

    from eventstore.client import Database
    from projector.build import Build
    from projector.metrics import Metrics
    from projector.position import Position
    from projector.settings import ProjectorSettings
    from projector.sources import Source

__all__ = ["Place", "Surroundings"]


class Place(Protocol):
    """What a loop and a scan need."""

    log: Database
    database: Database
    settings: ProjectorSettings
    metrics: Metrics
    uri: SecretStr | None
    """By which processes of our own connect; without it the log is read in this one."""


class Surroundings(Place, Protocol):
    """What a partition needs."""

    owner: str

    def source(self, build: Build, position: Position, slots: range) -> Source:
        """Opens a source of batches from a position."""
