"""Settings of the operator, from the environment (prefix `OPERATOR_`, and `INJECTOR_` for the sidecar injector)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from eventstore.settings import Settings

__all__ = ["InjectorSettings", "OperatorSettings"]


class OperatorSettings(Settings):
    """How `projector operator` runs."""

    model_config = SettingsConfigDict(env_prefix="OPERATOR_")

    namespaces: Annotated[tuple[str, ...], NoDecode] = ()
    """Namespaces whose resources it serves, separated by commas; none: all of the cluster."""

    http_host: str = "0.0.0.0"  # noqa: S104 - probes and Prometheus come from outside the pod
    """Address of probes and metrics."""

    http_port: int = Field(default=8082, ge=0, le=65535)
    """Port of probes and metrics."""

    resync_seconds: float = Field(default=60.0, ge=0.1, le=3600)
    """How often MongoDB is measured again when nothing has changed: how long drift can last."""

    poll_seconds: float = Field(default=5.0, ge=0.05, le=300)
    """How often what is in motion is looked at: builds, statuses of the projector, resources that are not ready."""

    silence_seconds: float = Field(default=90.0, ge=1, le=3600)
    """Age of a projection's status from which on its projector counts as gone."""

    stalled_seconds: float = Field(default=300.0, ge=1)
    """So long a due pass may stay away before the liveness probe fails."""

    @field_validator("namespaces", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class InjectorSettings(Settings):
    """How the sidecar injector answers the API server."""

    model_config = SettingsConfigDict(env_prefix="INJECTOR_")

    enabled: bool = False
    """Answer the API server at all."""

    host: str = "0.0.0.0"  # noqa: S104 - the API server calls from outside the pod
    """Address of the webhook."""

    port: int = Field(default=8443, ge=0, le=65535)
    """Port of the webhook."""

    cert_file: Path = Path("/etc/eventprojector/injector/tls.crt")
    """Its certificate, read again when it has changed."""

    key_file: Path = Path("/etc/eventprojector/injector/tls.key")
    """The key of that."""

    image: str = "eventprojector:latest"
    """Image of the sidecar, unless a pod names another one."""

    image_pull_policy: str = "IfNotPresent"
    """When that image is pulled."""

    secret_name: str = "eventprojector-mongodb"  # noqa: S105 - a name
    """Secret in the pod's namespace with the connection string, unless a pod names another one."""

    secret_key: str = "uri"  # noqa: S105 - a name
    """Key in that Secret, unless a pod names another one."""

    database: str = "eventstore"
    """Database of the log, unless a pod names another one."""

    ops_port: int = Field(default=8083, ge=1, le=65535)
    """Port of the sidecar's probes and metrics."""

    own_namespace: str = "eventprojector"
    """Namespace of the operator: pods there get no sidecar, nor do those in `kube-*` namespaces."""
