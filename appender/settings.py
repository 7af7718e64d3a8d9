"""Settings of the appender, from the environment (prefix `APPENDER_`)."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from eventstore.settings import Settings

__all__ = ["AppenderSettings"]


class AppenderSettings(Settings):
    """Where the appender listens, what it accepts, and how long it waits."""

    model_config = SettingsConfigDict(env_prefix="APPENDER_")

    host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback a token file is required."""

    port: int = Field(default=8080, ge=0, le=65535)
    """TCP port; 0 takes a free one."""

    ops_host: str = "0.0.0.0"  # noqa: S104 - the kubelet and Prometheus come from outside the pod
    """Address of that port."""

    ops_port: int | None = Field(default=None, ge=0, le=65535)
    """TCP port for `/healthz`, `/readyz` and `/metrics` alone, where the API's own is on the loopback of a pod."""

    token_file: Path | None = None
    """File with the bearer tokens that are accepted, one a line; read again when it changes, so that two may overlap."""

    max_event_bytes: int = Field(default=1024 * 1024, ge=1024, le=8 * 1024 * 1024)
    """Largest event as BSON. 1 MiB: a change event then stays far below MongoDB's 16 MiB."""

    max_request_bytes: int = Field(default=8 * 1024 * 1024, ge=1024, le=32 * 1024 * 1024)
    """Largest request body; a stream of lines has no limit but that of each event."""

    deadline_seconds: float = Field(default=15.0, gt=0, le=300)
    """How long an append may take before it is answered with 503. Longer than an election (about 12 s with MongoDB's
    defaults): a late success costs a caller less than an error that must be repeated."""

    read_timeout_seconds: float = Field(default=10.0, gt=0, le=300)
    """How long a client may be silent in the middle of a body or of taking an answer."""

    drain_seconds: float = Field(default=20.0, ge=0, le=3600)
    """After SIGTERM: how long the queue may drain. Below Kubernetes' default grace period of 30 s."""

    queue_events: int = Field(default=20_000, ge=1)
    """Events that may wait; more are answered with 503 and Retry-After. Three seconds of work at 7,000 events a second."""

    queue_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    """Bytes of events that may wait; the other bound of the queue."""

    heads: int = Field(default=65_536, ge=1)
    """Aggregates whose last sequenceNo is kept in memory: about 200 bytes each with ids of 40 characters, 12 MiB in all."""

    @property
    def loopback(self) -> bool:
        """Whether only this machine (this pod) can reach the appender."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @model_validator(mode="after")
    def _needs_token(self) -> AppenderSettings:
        if not self.loopback and self.token_file is None:
            raise ValueError(
                f"APPENDER_HOST={self.host} is reachable from beyond this machine: set APPENDER_TOKEN_FILE to a file with a"
                " bearer token, or listen on 127.0.0.1"
            )
        return self
