"""Writes the dashboards that the chart ships: `make dashboards`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from deploy.observability.appender import APPENDER
from deploy.observability.operator import OPERATOR
from deploy.observability.overview import OVERVIEW
from deploy.observability.panels import encode
from deploy.observability.projector import PROJECTOR

__all__ = ["FOLDER", "dashboards", "main"]

FOLDER: Final = Path(__file__).parents[1] / "helm/files/dashboards"


def dashboards() -> dict[str, str]:
    """The JSON of each, by file name."""
    made = {"overview": OVERVIEW, "appender": APPENDER, "projector": PROJECTOR, "operator": OPERATOR}
    return {f"{name}.json": encode(board) for name, board in made.items()}


def main() -> None:
    """Writes them."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
