"""A build: one versioned collection of a projection, filled from the log.

Version 1 of `permits` is built into `permits.v1`; built again (`projector rebuild permits` without a new version) it goes to
`permits.v1-2`, and so on. Everything that a projection keeps beside its documents is keyed by the build's id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from projector.projection import Projection

__all__ = ["Build"]


@dataclass(frozen=True, slots=True)
class Build:
    """A projection and the number of its build (1, 2 …)."""

    projection: Projection
    number: int = 1

    @property
    def id(self) -> str:
        """`permits.v1`, `permits.v1-2` …: names its checkpoints, leases and parked aggregates."""
        return f"{self.projection.name}.v{self.projection.version}{self._suffix}"

    @property
    def collection(self) -> str:
        """The collection with its documents."""
        return f"{self.projection.versioned}{self._suffix}"

    @property
    def marks(self) -> str:
        """The collection with the marks that have no document to lie in."""
        return f"{self.collection}.marks"

    @property
    def _suffix(self) -> str:
        return "" if self.number == 1 else f"-{self.number}"
