"""Settings that all parts share, from the environment; the README of the chart lists them with their defaults.

A secret may stand in a file: `MONGODB_URI_FILE=/run/secrets/uri` is the same as `MONGODB_URI=…`, and wins over it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

__all__ = ["EventStoreSettings", "Settings"]


class _SecretFiles(PydanticBaseSettingsSource):
    """Reads the file that `<NAME>_FILE` names, for the fields that are secrets."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        if field.annotation is not SecretStr:
            return None, field_name, False
        prefix = str(self.config.get("env_prefix", ""))
        path = os.environ.get(f"{prefix}{field_name}".upper() + "_FILE")
        return (Path(path).read_text().strip() if path else None), field_name, False

    def __call__(self) -> dict[str, Any]:
        found = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in found.items() if value is not None}


class Settings(BaseSettings):
    """Base of every settings model: frozen, from the environment alone, secrets from files too."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What is given in code wins, then secret files, then the environment."""
        return init_settings, _SecretFiles(settings_cls), env_settings


class EventStoreSettings(Settings):
    """Where the log lies and how a process of ours speaks."""

    mongodb_uri: SecretStr = SecretStr("mongodb://127.0.0.1:27017/?replicaSet=rs0")
    """Connection string. A replica set or a sharded cluster: transactions and change streams need one."""

    eventstore_database: str = Field(default="eventstore", min_length=1, max_length=63)
    """Database of the collection `events`."""

    eventstore_provision: bool = True
    """Create the collection, its indexes and its validator at start where they are missing."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is logged. At `info` a line tells a change of state; normal operation is silent."""

    log_format: Literal["json", "console"] = "json"
    """One JSON object a line, or text for eyes."""
