"""What the commands take from their surroundings: settings, and projections in Python modules."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from pydantic import ValidationError

from eventstore.settings import EventStoreSettings
from projector.errors import ProjectionError
from projector.loader import distinct, load_folder, load_modules
from projector.settings import ProjectorSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from projector.projection import Projection

__all__ = ["code_of_modules", "load_projections", "settings_of_environment"]


def settings_of_environment() -> tuple[ProjectorSettings, EventStoreSettings]:
    """The settings. Raises `click.ClickException` that names each variable that does not fit, without its value."""
    try:
        return ProjectorSettings(), EventStoreSettings()
    except OSError as error:
        raise click.ClickException(str(error)) from error
    except ValidationError as error:
        prefix = "PROJECTOR_" if error.title == ProjectorSettings.__name__ else ""
        lines = [
            f"{prefix}{'.'.join(str(part) for part in each['loc']).removeprefix(prefix).upper()}: {each['msg']}"
            for each in error.errors()
        ]
        raise click.ClickException("\n".join(lines)) from error


def load_projections(folder: Path | None, modules: Sequence[str]) -> list[Projection]:
    """The projections of a folder and of modules, if no two get in each other's way. Raises `click.ClickException`."""
    sys.path.insert(
        0, str(Path.cwd())
    )  # a command's path begins with its own folder, that of `python -m` with this one
    try:
        return distinct([*(load_folder(folder) if folder else ()), *(load_modules(modules) if modules else ())])
    except ProjectionError as error:
        raise click.ClickException(str(error)) from error


def code_of_modules(modules: Sequence[str]) -> dict[str, Projection]:
    """The projections of modules by name. Raises `click.ClickException`."""
    return {projection.name: projection for projection in load_projections(None, modules)}
