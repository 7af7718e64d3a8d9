"""Hears from pymongo when another member became primary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymongo.monitoring import TopologyListener

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from pymongo.monitoring import TopologyClosedEvent, TopologyDescriptionChangedEvent, TopologyOpenedEvent

__all__ = ["PrimaryWatcher"]


class PrimaryWatcher(TopologyListener):
    """Calls `changed` on the loop when a primary is found that is another one than the last."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._primary: tuple[str, int | None] | None = None
        self.changed: Callable[[], None] | None = None

    def opened(self, event: TopologyOpenedEvent) -> None:
        """Nothing is known yet."""

    def description_changed(self, event: TopologyDescriptionChangedEvent) -> None:
        """Some member changed its state."""
        for address, server in event.new_description.server_descriptions().items():
            if server.server_type_name == "RSPrimary" and address != self._primary:
                known, self._primary = self._primary, address
                if known is not None and self.changed is not None:
                    self._loop.call_soon_threadsafe(self.changed)

    def closed(self, event: TopologyClosedEvent) -> None:
        """The client ends."""
