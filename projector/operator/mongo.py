"""The operator's connections: one per connection string, shared by all resources that name it.

Each has two clients. The one for questions gives up after seconds, as everywhere. The one for builds has no timeout on
its sockets, because `createIndexes` answers when the index is built, which may take hours.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Final

from pymongo.errors import PyMongoError

from eventstore.client import Client, Database, cause, connect, open_database
from eventstore.errors import Meaning, classify

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pydantic import SecretStr

__all__ = ["Connections", "Mongo", "MongoAwayError"]

_AT_ONCE: Final = 16
"""Passes at once on one MongoDB. More would only wait for each other in the server, fewer make a restart with hundreds of
resources slow."""

_AWAY_SECONDS: Final = 5.0
"""So long a server that could not be reached is not asked again: with hundreds of resources each would wait in vain."""


class MongoAwayError(Exception):
    """MongoDB could not be reached a moment ago, and was not asked again; `error` is what it was then."""

    def __init__(self, error: PyMongoError) -> None:
        super().__init__(str(error))
        self.error = error


class Mongo:
    """One MongoDB deployment."""

    def __init__(self, uri: SecretStr) -> None:
        self.uri = uri
        self.client: Client = connect(uri, "operator")
        self._builds: Client | None = None
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._away: tuple[float, PyMongoError] | None = None

    def database(self, name: str) -> Database:
        """A database for short questions and writes."""
        return open_database(self.client, name)

    def build_database(self, name: str) -> Database:
        """The same database by a client that waits for as long as an index build takes."""
        if self._builds is None:
            self._builds = connect(self.uri, "operator-build", socketTimeoutMS=None)
        return open_database(self._builds, name)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits for one of the turns; raises MongoAwayError when the server was away a moment ago.

        A server that is away because it refused our credentials counts as that: the driver hides it behind a timeout.
        """
        async with self._turns:
            if self._away is not None and time.monotonic() < self._away[0]:
                raise MongoAwayError(self._away[1])
            try:
                yield
            except PyMongoError as error:
                if classify(error) is not Meaning.UNAVAILABLE:
                    raise
                reason = cause(self.client, error)
                self._away = time.monotonic() + _AWAY_SECONDS, reason
                if reason is error:
                    raise
                raise reason from error
            self._away = None

    async def retire(self) -> None:
        """Closes it once the passes that use it are through."""
        for _ in range(_AT_ONCE):
            await self._turns.acquire()
        await self.close()

    async def close(self) -> None:
        """Closes both clients; a build goes on in the server."""
        await self.client.close()
        if self._builds is not None:
            await self._builds.close()


class Connections:
    """The connections by what they are called in the resources: one each, opened anew when its string has changed."""

    def __init__(self) -> None:
        self._open: dict[str, Mongo] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    def get(self, key: str, uri: SecretStr) -> Mongo:
        """The connection called `key`. Raises `pymongo.errors.ConfigurationError` for a bad connection string."""
        known = self._open.get(key)
        if known is not None and known.uri == uri:
            return known
        opened = Mongo(uri)
        self._open[key] = opened
        if known is not None:
            task = asyncio.create_task(known.retire(), name=f"retire the connection {key}")
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        return opened

    async def close(self) -> None:
        """Closes all of them."""
        await asyncio.gather(*self._retiring)
        for mongo in self._open.values():
            await mongo.close()
        self._open.clear()
