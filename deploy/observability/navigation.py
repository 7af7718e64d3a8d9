"""The site's navigation (a hook of mkdocs): every page, in the order in which a reader needs the sections.

A list by hand would have to be kept by everybody who adds a page.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

__all__ = ["navigation", "on_config"]

SECTIONS: Final = {
    "Tutorial": "tutorial",
    "How to": "how-to",
    "Reference": "reference",
    "Explanation": "explanation",
    "Runbooks": "runbooks",
}
FIRST: Final = (
    "index", "first-steps", "cluster", "install", "append", "project", "http-api", "projections", "custom-resources",
    "projector-command", "ops-api", "ordering", "exactly-once",
)  # fmt: skip
"""Pages that come before the others of their section, which follow by name."""


def navigation(folder: Path) -> list[Any]:
    """The pages of a folder of documentation, as mkdocs' `nav`."""

    def place(page: Path) -> tuple[int, str]:
        return (FIRST.index(page.stem) if page.stem in FIRST else len(FIRST)), page.stem

    found: list[Any] = ["index.md"]
    for title, name in SECTIONS.items():
        pages = sorted((folder / name).glob("*.md"), key=place)
        if pages:
            found.append({title: [page.relative_to(folder).as_posix() for page in pages]})
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Called by mkdocs before it builds."""
    config.nav = navigation(Path(config.docs_dir))
    return config
