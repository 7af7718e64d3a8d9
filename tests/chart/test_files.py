"""The chart's own programs, run as their pods run them, against a real mongod."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from pymongo import MongoClient

from eventstore.embedded import Member, free_port
from tests.chart.rendering import CHART
from tests.conftest import need_mongod

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def mongod(tmp_path: Path) -> Iterator[Member]:
    """A mongod of a replica set that nobody has initiated."""
    need_mongod()
    port = free_port()
    member = Member(tmp_path / "data", port, ["--replSet", "rs0", "--bind_ip", "127.0.0.1", "--nounixsocket"])
    yield member
    if member.process is not None:
        member.kill()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)


def test_the_embedded_mongod_becomes_a_replica_set_and_shows_it(mongod: Member, tmp_path: Path) -> None:
    """Started before mongod; after mongod has lost its volume it initiates it anew."""
    host, primary = f"127.0.0.1:{mongod.port}", tmp_path / "primary"
    script = (CHART / "files" / "mongodb" / "initiate.py").read_text().strip()
    with subprocess.Popen(
        [sys.executable, "-c", script, host, str(primary)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            mongod.start()
            until(primary.exists)
            with MongoClient(f"mongodb://{host}/?replicaSet=rs0", serverSelectionTimeoutMS=10_000) as client:
                client["shop"]["orders"].insert_one({})
                config = client.admin.command("replSetGetConfig")["config"]
            assert [each["host"] for each in config["members"]] == [host]

            mongod.kill()
            until(lambda: not primary.exists())
            mongod.folder = tmp_path / "another"
            mongod.start()
            until(primary.exists)
        finally:
            process.terminate()
        output = process.communicate(timeout=30)[0]
    assert output.count("initiated the replica set rs0") == 2
    assert output.count("primary\n") >= 2
