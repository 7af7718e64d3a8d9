"""A cluster as a person sees it: kubectl, helm, and a port of a pod brought here."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pymongo import MongoClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_T = TypeVar("_T")


class CommandError(Exception):
    """A command that failed, with what it said."""


def run(*command: str, stdin: str | None = None, timeout: float = 180) -> str:
    """Runs a command and returns what it printed. Raises CommandError."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise CommandError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def eventually(what: str, condition: Callable[[], _T], seconds: float = 120) -> _T:
    """Polls until the condition returns something true, and returns it; fails with what was seen last."""
    deadline = time.monotonic() + seconds
    while True:
        seen = condition()
        if seen:
            return seen
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.5)


@dataclass(frozen=True)
class Namespace:
    """A namespace, and the commands in it."""

    name: str

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout: float = 180) -> str:
        """kubectl in this namespace."""
        return run("kubectl", "--namespace", self.name, *arguments, stdin=stdin, timeout=timeout)

    def helm(self, *arguments: str, values: dict[str, Any] | None = None, timeout: float = 240) -> str:
        """helm in this namespace."""
        more = ["--values", "-"] if values is not None else []
        text = yaml.safe_dump(values) if values is not None else None
        return run("helm", "--namespace", self.name, *arguments, *more, stdin=text, timeout=timeout)

    def apply(self, *manifests: dict[str, Any]) -> None:
        """kubectl apply."""
        self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(manifests))

    def get(self, *arguments: str) -> Any:
        """kubectl get, decoded; a list's items."""
        found = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found["items"] if found["kind"] == "List" else found

    def pods(self, component: str) -> list[str]:
        """Names of the pods of a component that are not on their way out."""
        pods = self.get("pods", "-l", f"app.kubernetes.io/instance=es,app.kubernetes.io/component={component}")
        return [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def rolled_out(self, deployment: str) -> None:
        """Waits until a Deployment has all its pods."""
        self.kubectl("rollout", "status", "deployment", deployment, "--timeout=150s")

    def job_done(self, name: str, seconds: float = 240) -> str:
        """Waits until a Job is complete; returns its log. Fails at once when the Job does."""

        def state() -> str | None:
            conditions = self.get("job", name).get("status", {}).get("conditions", [])
            return next(
                (
                    each["type"]
                    for each in conditions
                    if each["status"] == "True" and each["type"] in {"Complete", "Failed"}
                ),
                None,
            )

        ended = eventually(f"the job {name} ends", state, seconds)
        log = self.kubectl("logs", f"job/{name}", "-c", "main")
        assert ended == "Complete", f"{log}\n{self.kubectl('logs', f'job/{name}', '-c', 'appender', '--tail=30')}"
        return log

    @contextlib.contextmanager
    def forwarded(self, target: str, port: int) -> Iterator[int]:
        """A local port that leads to a port of a pod."""
        command = ["kubectl", "--namespace", self.name, "port-forward", target, f":{port}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                found = re.search(r"127\.0\.0\.1:(\d+) ->", line)
                assert found, line
                yield int(found[1])
            finally:
                process.terminate()

    @contextlib.contextmanager
    def mongodb(self, pod: str) -> Iterator[MongoClient[dict[str, Any]]]:
        """A client of the mongod in a pod."""
        with (
            self.forwarded(f"pod/{pod}", 27017) as port,
            MongoClient[dict[str, Any]](
                "127.0.0.1", port, directConnection=True, tz_aware=True, serverSelectionTimeoutMS=20_000
            ) as client,
        ):
            yield client
