"""The one way to a MongoDB client, so that no part writes with less than a majority or waits without end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import pymongo
from bson.codec_options import CodecOptions, DatetimeConversion
from pymongo import AsyncMongoClient
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import PyMongoError
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from eventstore import __version__
from eventstore.errors import Meaning, classify
from eventstore.logs import redact

if TYPE_CHECKING:
    from pydantic import SecretStr

__all__ = ["CODEC", "MAJORITY", "Client", "Database", "cause", "connect", "open_database", "silence"]

Client: TypeAlias = AsyncMongoClient[dict[str, Any]]
Database: TypeAlias = AsyncDatabase[dict[str, Any]]

MAJORITY: Final = WriteConcern(w="majority", j=True)
"""What an acknowledgement means here: on disk with a majority of the members."""

CODEC: Final[CodecOptions[dict[str, Any]]] = CodecOptions(
    tz_aware=True,
    # A date that Python cannot hold (another writer's) must not make the whole batch unreadable.
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
)


PING_SECONDS: Final = 1.0
"""`/readyz` waits no longer for MongoDB: Kubernetes' probes give up after a second by default."""

_E = TypeVar("_E", bound=Exception)


def connect(uri: SecretStr, component: str, **overrides: Any) -> Client:
    """A client for one part (`appender`, `projector`, `operator`), not yet connected.

    It writes with majority and journal whatever the URI says, and each of its waits ends: 5 s to find a server or to
    connect, 30 s without an answer on a socket (above the longest change-stream wait and below a client's patience).
    `overrides` are pymongo's own options. Raises `pymongo.errors.ConfigurationError` for a bad URI.
    """
    options: dict[str, Any] = {
        "appname": f"eventprojector-{component}/{__version__}",
        "w": "majority",
        "journal": True,
        "retryWrites": True,
        "retryReads": True,
        "serverSelectionTimeoutMS": 5_000,
        "connectTimeoutMS": 5_000,
        "socketTimeoutMS": 30_000,
        "waitQueueTimeoutMS": 5_000,
        "tz_aware": True,
        "datetime_conversion": "DATETIME_AUTO",
    }
    return AsyncMongoClient(uri.get_secret_value(), **(options | overrides))


def open_database(client: Client, name: str) -> Database:
    """A database whose reads see only what a majority has, and whose writes wait for one."""
    return client.get_database(name, codec_options=CODEC, read_concern=ReadConcern("majority"), write_concern=MAJORITY)


def cause(client: Client, error: _E) -> _E | PyMongoError:
    """What an operation of the client failed of: the refusal of our credentials, which the driver tells as "no server was found
    in time" (with the server's words, without its code); else `error` itself.
    """
    if classify(error) is not Meaning.UNAVAILABLE:
        return error
    found = (server.error for server in client.topology_description.server_descriptions().values())
    refusals = (each for each in found if isinstance(each, PyMongoError) and classify(each) is Meaning.DENIED)
    return next(refusals, error)


async def silence(database: Database) -> str | None:
    """None when MongoDB answers within a second, else why it does not, without credentials: for readiness."""
    try:
        with pymongo.timeout(PING_SECONDS):
            await database.command("ping")
    except (PyMongoError, TimeoutError) as error:
        return f"MongoDB does not answer: {redact(str(error)) or 'no answer in time'}"
    return None
