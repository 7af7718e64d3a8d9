"""The projector's gauges tell the state of what readers see, from memory alone, and never one of the past."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from bson.timestamp import Timestamp

from projector.builds import Control
from projector.checkpoint import PartitionId
from projector.metrics import Metrics
from projector.position import Position
from projector.progress import Progress
from projector.status import Reports


def partition(build: str, state: str, behind: float | None = None) -> Any:
    """A partition that runs, and how far it is behind in seconds; None: it has caught up."""
    position = Position({}, Timestamp(int(time.time() - (behind or 0)), 0))
    progress = Progress(state=state, caught_up=behind is None, position=position, checkpoint=position)
    return SimpleNamespace(
        partition=SimpleNamespace(id=PartitionId(build, 0, 1), progress=progress),
        build=SimpleNamespace(projection=SimpleNamespace(name=build.partition(".")[0])),
    )


def shown(control: Control, *partitions: Any) -> Any:
    """Asks for a gauge's value after a look at these partitions; there is no database to ask."""
    metrics = Metrics()
    metrics.start(control.name)
    nothing: Any = None
    reports = Reports(nothing, nothing, metrics, "me")

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, {"projection": control.name, **labels})

    reports.show({str(each.partition.id): each for each in partitions}, {control.name: control})
    return value


def test_a_build_beside_the_one_that_is_read_is_behind_by_nature() -> None:
    value = shown(
        Control(name="orders", live="orders.v1", candidate="orders.v2"),
        partition("orders.v1", "live"),
        partition("orders.v2", "rebuilding", behind=500),
    )
    assert value("projector_lag_seconds") == 0
    assert value("projector_health", state="live") == 1
    assert value("projector_health", state="rebuilding") == 0
    assert value("projector_partitions_owned") == 2
    assert value("projector_resume_token_age_seconds") == pytest.approx(500, abs=5), (
        "its token may be lost all the same"
    )


def test_the_first_build_is_what_there_is() -> None:
    value = shown(Control(name="orders", candidate="orders.v1"), partition("orders.v1", "rebuilding", behind=90))
    assert value("projector_lag_seconds") == pytest.approx(90, abs=5)
    assert value("projector_health", state="rebuilding") == 1


def test_a_partition_that_waits_for_mongodb_falls_behind() -> None:
    value = shown(Control(name="orders", live="orders.v1"), partition("orders.v1", "waiting", behind=45))
    assert value("projector_lag_seconds") == pytest.approx(45, abs=5)
    assert value("projector_backlog_events") >= 1
    assert value("projector_health", state="waiting") == 1


def test_what_does_not_run_here_leaves_nothing_behind() -> None:
    value = shown(Control(name="orders", live="orders.v1"))
    for name in ("projector_lag_seconds", "projector_backlog_events", "projector_partitions_owned"):
        assert value(name) == 0
    assert value("projector_heartbeat_timestamp_seconds") is None
    assert value("projector_health", state="standby") == 1
    assert value("projector_oplog_window_seconds") is None


@pytest.mark.parametrize(("changes", "state"), [({"failed": "too many"}, "failed"), ({"paused": True}, "paused")])
def test_orders_and_stops_win_over_what_partitions_say(changes: dict[str, Any], state: str) -> None:
    value = shown(Control(name="orders", live="orders.v1", **changes), partition("orders.v1", "live"))
    assert value("projector_health", state=state) == 1
    assert value("projector_health", state="live") == 0
