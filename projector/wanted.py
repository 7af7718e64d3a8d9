"""What a projector shall run, and where it hears of that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from projector.projection import Projection

__all__ = ["Catalog", "FixedCatalog", "Wanted"]


class Wanted:
    """A projection that shall run, and how."""

    def __init__(
        self,
        projection: Projection,
        *,
        partitions: int | None = None,
        paused: bool = False,
        manual_cutover: bool = False,
    ) -> None:
        self.projection = projection
        self.partitions = partitions
        """None: as it is, or as `projector partitions` set it."""
        self.paused = paused
        self.manual_cutover = manual_cutover


class Catalog(Protocol):
    """Where the projections come from."""

    @property
    def problems(self) -> Mapping[str, str]:
        """What was wrong with a projection's definition, by its name, at the last call of `wanted`."""

    async def wanted(self) -> Sequence[Wanted]:
        """All that shall run now; called every tick."""


class FixedCatalog:
    """Projections that were loaded once, from a folder or from modules."""

    def __init__(self, projections: Sequence[Projection]) -> None:
        self.problems: Mapping[str, str] = {}
        self._wanted = [Wanted(projection) for projection in projections]

    async def wanted(self) -> Sequence[Wanted]:
        """The same every time."""
        return self._wanted
