"""Settings of the projector, from the environment (prefix `PROJECTOR_`); `eventstore.settings` has the shared ones."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from eventstore.settings import Settings

__all__ = ["ProjectorSettings"]


class ProjectorSettings(Settings):
    """How `projector run` runs."""

    model_config = SettingsConfigDict(env_prefix="PROJECTOR_")

    database: str | None = Field(default=None, min_length=1, max_length=63)
    """Database of the read models and their bookkeeping; default: the one of the log."""

    projections: Path | None = None
    """A folder with declared projections (`*.yaml`)."""

    http_host: str = "0.0.0.0"  # noqa: S104 - probes and Prometheus come from outside the pod
    """Address of the ops API, probes and metrics."""

    http_port: int = Field(default=8081, ge=0, le=65535)
    """TCP port of the ops API, probes and metrics; 0 takes a free one."""

    token_file: Path | None = None
    """File with the bearer tokens that orders over HTTP need, one a line; read again when it changes. Without it only what
    listens on loopback takes orders."""

    lease_seconds: float = Field(default=10.0, ge=0.5, le=300)
    """How long a partition stands still after its owner was killed."""

    retry_seconds: float = Field(default=30.0, ge=0, le=3600)
    """How long a failing event is tried again before its aggregate is parked."""

    max_parked: int = Field(default=1_000, ge=1, le=100_000)
    """Aggregates that may be set aside per partition; one more stops the projection."""

    drain_seconds: float = Field(default=20.0, ge=0, le=600)
    """How long a shutdown may take to write what was folded."""

    rebuild_processes: int | None = Field(default=None, ge=1, le=64)
    """Processes that read the log when a long one is built anew; default: two, or one on one processor."""

    rebuild_events_per_second: float = Field(default=0, ge=0)
    """Holds rebuilds back, to spare MongoDB; 0: as fast as it goes."""
