"""What the chart's tests share: where the chart is, and how to find something in what Helm rendered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

Manifest: TypeAlias = dict[str, Any]
Helm: TypeAlias = Callable[..., str]
Render: TypeAlias = Callable[..., list[Manifest]]

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm"
KUBERNETES = "1.34.0"
EMBEDDED = {"mongodb": {"embedded": {"enabled": True}}}


class RenderError(Exception):
    """What Helm says when it refuses."""


def find(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """The one object of that kind and name."""
    [found] = [each for each in manifests if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The pod specs of all workloads, by kind and name."""
    found = {}
    for each in manifests:
        where = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] in {"Deployment", "StatefulSet", "Job"}:
            found[where] = each["spec"]["template"]["spec"]
        elif each["kind"] == "Pod":
            found[where] = each["spec"]
    return found


def environment(container: Manifest) -> dict[str, Any]:
    """A container's environment by name: the value, or where it comes from."""
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}
