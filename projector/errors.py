"""What can go wrong with a projection, before it runs and while it runs.

ValueError
├── ProjectionError   the definition is wrong: it is refused when it is loaded
└── FoldError         this event cannot be applied to this document: the event fails, its aggregate is parked
"""

from __future__ import annotations

__all__ = ["FoldError", "ProjectionError"]


class ProjectionError(ValueError):
    """A projection is defined wrongly; the text names the file where there is one, the place, and what is wrong."""


class FoldError(ValueError):
    """An event cannot be applied; the text names the place in the definition, and what is wrong with the values."""
