"""The little that the operator asks the Kubernetes API beside what kopf does: the values of Secrets, one `get` each.

No watch on Secrets, so that the operator's role need not list them.
"""

from __future__ import annotations

import base64
import binascii
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import aiohttp
import kopf
from pydantic import SecretStr

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SecretUnreadableError", "Secrets", "login"]

_FRESH_SECONDS: Final = 30.0
"""So long a value is good: a rotated password is noticed within that time, and a resync costs no call each."""
_MOST: Final = 1_000
_TIMEOUT: Final = aiohttp.ClientTimeout(total=10)


class SecretUnreadableError(Exception):
    """A Secret, or a key in it, is missing or cannot be read; the text says which, never what is in it."""


def login(settings: kopf.OperatorSettings, **_: Any) -> kopf.ConnectionInfo | None:
    """The pod's service account, else the kubeconfig."""
    return kopf.login_with_service_account(settings=settings) or kopf.login_with_kubeconfig(settings=settings)


class Secrets:
    """Reads values of Secrets, and keeps them for seconds."""

    def __init__(self, credentials: Callable[[], kopf.ConnectionInfo | None]) -> None:
        self._credentials = credentials
        self._kept: dict[tuple[str, str], tuple[float, dict[str, str]]] = {}

    async def get(self, namespace: str, name: str, key: str) -> SecretStr:
        """One value. Raises SecretUnreadableError, or `aiohttp.ClientError` when the API server cannot be asked."""
        kept = self._kept.get((namespace, name))
        if kept is None or time.monotonic() - kept[0] > _FRESH_SECONDS:
            kept = time.monotonic(), await self._read(namespace, name)
            if len(self._kept) >= _MOST:
                self._kept.clear()
            self._kept[namespace, name] = kept
        try:
            value = base64.b64decode(kept[1][key], validate=True).decode()
        except KeyError:
            raise SecretUnreadableError(f"Secret {namespace}/{name} has no key {key}") from None
        except (binascii.Error, UnicodeDecodeError):
            raise SecretUnreadableError(f"Secret {namespace}/{name}: {key} is no text") from None
        return SecretStr(value.strip())

    async def _read(self, namespace: str, name: str) -> dict[str, str]:
        info = self._credentials()
        if info is None:
            raise SecretUnreadableError("there are no credentials for the Kubernetes API")
        url = f"{info.server}/api/v1/namespaces/{quote(namespace)}/secrets/{quote(name)}"
        connector = aiohttp.TCPConnector(ssl=info.as_ssl_context())
        async with (
            aiohttp.ClientSession(connector=connector, headers=info.as_http_headers(), timeout=_TIMEOUT) as session,
            session.get(url) as response,
        ):
            if response.status == 404:
                raise SecretUnreadableError(f"there is no Secret {namespace}/{name}")
            if response.status in {401, 403}:
                raise SecretUnreadableError(f"the operator may not read Secret {namespace}/{name}")
            response.raise_for_status()
            return (await response.json()).get("data") or {}
