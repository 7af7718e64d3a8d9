"""The chart as Helm renders it, offline."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.rendering import CHART, EMBEDDED, KUBERNETES, Helm, Manifest, Render, RenderError
from tests.conftest import missing


@pytest.fixture(scope="session")
def helm() -> str:
    """The program, on PATH or among those of the one-node cluster."""
    home = Path(os.environ.get("CLUSTER_HOME", Path.home() / ".cache" / "cluster"))
    found = shutil.which("helm") or shutil.which("helm", path=str(home / "bin"))
    return found or missing("there is no helm: put it on PATH, or run ../shared/cluster/build")


@pytest.fixture(scope="session")
def run_helm(helm: str) -> Helm:
    """Runs helm; raises RenderError with its words."""

    def run(*arguments: str, values: Any = None) -> str:
        done = subprocess.run(
            [helm, *arguments, *(["--values", "-"] if values is not None else [])],
            input=yaml.safe_dump(values) if values is not None else None,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RenderError(done.stderr)
        return done.stdout

    return run


@pytest.fixture(scope="session")
def render(run_helm: Helm) -> Render:
    """Renders the chart with these values (the embedded MongoDB unless they say where MongoDB is) to its manifests."""

    def render_chart(
        values: dict[str, Any] | None = None, *, apis: tuple[str, ...] = (), version: str = KUBERNETES
    ) -> list[Manifest]:
        values = values or {}
        values = values if "mongodb" in values else values | EMBEDDED
        text = run_helm(
            "template",
            "shop",
            str(CHART),
            "--namespace",
            "shop",
            "--kube-version",
            version,
            *(f"--api-versions={api}" for api in apis),
            values=values,
        )
        return [manifest for manifest in yaml.safe_load_all(text) if manifest]

    return render_chart
