"""Fixtures of all tiers: a real MongoDB, and a database of its own for each test.

`MONGODB_URI` if set; else testcontainers where Docker runs; else the mongod of the extra `embedded`. None of them: the
test is skipped with the reason, and in CI (`CI=true`) it fails.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from typing import TYPE_CHECKING, NoReturn

import pytest
from pydantic import SecretStr

from eventstore.client import Client, Database, connect, open_database
from eventstore.embedded import MongodNotFoundError, ReplicaSet, find_mongod
from eventstore.indexes import provision

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


def missing(what: str) -> NoReturn:
    """A part that a test needs is not here: a failure in CI, a loud skip elsewhere."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


def need_mongod() -> None:
    """For tests that start a mongod of their own: fails, or skips, where there is none."""
    try:
        find_mongod()
    except MongodNotFoundError as error:
        missing(str(error))


def _docker_runs() -> bool:
    docker = shutil.which("docker")
    return (
        docker is not None
        and subprocess.run([docker, "info"], capture_output=True, timeout=20, check=False).returncode == 0
    )


@contextlib.contextmanager
def _mongodb() -> Iterator[str]:
    if uri := os.environ.get("MONGODB_URI"):
        yield uri
    elif _docker_runs():
        from testcontainers.mongodb import MongoDbContainer

        with MongoDbContainer("mongo:6.0").with_command("mongod --replSet rs0") as container:
            uri = container.get_connection_url() + "/?directConnection=true"
            container.exec(["mongosh", "--quiet", "--eval", "rs.initiate()"])
            yield uri
    else:
        need_mongod()
        with ReplicaSet() as replica_set:
            yield replica_set.uri


@pytest.fixture(scope="session")
def mongodb_uri() -> Iterator[str]:
    """Connection string of a replica set that all tests of the session share."""
    with _mongodb() as uri:
        yield uri


@pytest.fixture
async def client(mongodb_uri: str) -> AsyncIterator[Client]:
    """A client as the parts use it."""
    async with connect(SecretStr(mongodb_uri), "test") as connected:
        yield connected


@pytest.fixture
def database_name() -> str:
    """A name that no other test has."""
    return f"test_{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def database(client: Client, database_name: str) -> AsyncIterator[Database]:
    """An empty, provisioned event store; dropped after the test."""
    opened = open_database(client, database_name)
    await provision(opened)
    yield opened
    await client.drop_database(database_name)
