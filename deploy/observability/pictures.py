"""Draws the dashboards from what a Prometheus has, since a Grafana is not at hand where they are tested."""

from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from matplotlib import pyplot
from PIL import Image

from deploy.observability.dashboards import FOLDER
from deploy.observability.expressions import Expression

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

__all__ = ["draw"]

UNIT_WIDTH, UNIT_HEIGHT = 0.62, 0.3
"""Inches of a cell of Grafana's grid."""

RATE_INTERVAL: Final = "15s"
_LEGENDS = 8
"""Series that are named; of more a legend would hide the picture."""
_COLOURS: Final = {
    "red": "#c4162a", "orange": "#ff780a", "dark-orange": "#fa6400", "yellow": "#f2cc0c", "green": "#37872d", "blue": "#1f60c4",
    "purple": "#8f3bb8", "super-light-blue": "#c0d8ff", "text": "#8e8e8e", "transparent": "none",
}  # fmt: skip


class Series(Protocol):
    """A series of a range query."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


_Found: TypeAlias = dict[int, list[tuple[str, "Sequence[Series]"]]]
"""By panel: the legend and the series of each query."""


class Course(Protocol):
    """Asks Prometheus for the course of an expression."""

    def __call__(self, expression: str, start: float, end: float, step: float) -> Awaitable[Sequence[Series]]: ...


async def draw(course: Course, start: float, end: float, folder: Path) -> None:
    """Writes a PNG of each dashboard over this time."""
    for name, document in _documents().items():
        found: _Found = {}
        for panel in document["panels"]:
            for target in panel.get("targets", ()):
                text = Expression("", target["expr"]).filled(RATE_INTERVAL)
                found.setdefault(panel["id"], []).append((target["legendFormat"], await course(text, start, end, 1)))
        _plot(document, found, start, folder / f"{name}.png")


def _documents() -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def _plot(document: Mapping[str, Any], found: _Found, start: float, target: Path) -> None:
    """A dashboard in Grafana's layout."""
    panels = document["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    inches = height * UNIT_HEIGHT + 0.4
    figure = pyplot.figure(figsize=(24 * UNIT_WIDTH, inches), facecolor="white")
    figure.suptitle(document["title"], x=0.01, y=0.997, ha="left", va="top", fontsize=12, weight="bold")
    top = height * UNIT_HEIGHT / inches
    for panel in panels:
        place = panel["gridPos"]
        left, bottom = place["x"] / 24, (1 - (place["y"] + place["h"]) / height) * top
        width, tall = place["w"] / 24, place["h"] / height * top
        if panel["type"] == "row":
            figure.text(left + 0.01, bottom + tall / 2, panel["title"], fontsize=9, weight="bold", va="center")
            continue
        margin = 0.075 if panel["type"] == "state-timeline" else 0.035
        axes = figure.add_axes((left + margin, bottom + tall * 0.13, width - margin - 0.01, tall * 0.7))
        axes.set_title(panel["title"], fontsize=8, loc="left", pad=3)
        axes.tick_params(labelsize=6, length=2)
        _KINDS.get(panel["type"], _lines)(axes, panel, found[panel["id"]], start)
    target.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90)
    pyplot.close(figure)
    with Image.open(drawn) as image:  # a palette: a quarter of the size
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)


def _legend(form: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)}}", lambda name: labels.get(name[1], ""), form)


def _lines(axes: Axes, panel: Mapping[str, Any], found: Sequence[tuple[str, Sequence[Series]]], start: float) -> None:
    names = 0
    for form, series in found:
        for each in series:
            xs, ys = [at - start for at, _ in each.points], [value for _, value in each.points]
            named = any(ys) and names < _LEGENDS
            names += named
            axes.plot(
                xs,
                ys,
                linewidth=0.9,
                label=_legend(form, each.labels) if named else None,
                marker="." if len(xs) < 9 else None,
            )
    axes.set_ylim(bottom=0)
    axes.grid(linewidth=0.3)
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if unit == "bytes":
        axes.yaxis.set_major_formatter(
            lambda value, _: f"{value / 2**20:.0f} MiB" if value >= 2**20 else f"{value / 2**10:.0f} KiB"
        )
    else:
        axes.set_ylabel(unit.replace("percentunit", "1"), fontsize=6, labelpad=1)
    if names:
        axes.legend(fontsize=5.5, loc="upper left", framealpha=0.6, borderpad=0.3, labelspacing=0.2)


def _number(axes: Axes, panel: Mapping[str, Any], found: Sequence[tuple[str, Sequence[Series]]], start: float) -> None:
    points = [point for _, series in found for each in series for point in each.points if point[1] == point[1]]
    axes.set_axis_off()
    if not points:
        return
    value = points[-1][1]
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    colour = next(step["color"] for step in reversed(steps) if step["value"] is None or value >= step["value"])
    unit = panel["fieldConfig"]["defaults"]["unit"]
    shown = f"{value:.2%}" if unit == "percentunit" else f"{value:.4g} {'' if unit == 'short' else unit}"
    axes.fill_between(
        [at - start for at, _ in points], [value for _, value in points], color=_COLOURS[colour], alpha=0.15
    )
    axes.text(0.5, 0.5, shown, transform=axes.transAxes, ha="center", va="center", fontsize=12, color=_COLOURS[colour])


def _timeline(
    axes: Axes, panel: Mapping[str, Any], found: Sequence[tuple[str, Sequence[Series]]], start: float
) -> None:
    options = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    every = [(_legend(form, each.labels), each) for form, series in found for each in series]
    for row, (_, each) in enumerate(every):
        for at, value in each.points:
            colour = options.get(f"{value:.0f}", {"color": "text"})["color"]
            axes.barh(row, 1.0, left=at - start, height=0.8, color=_COLOURS[colour], linewidth=0)
    axes.set_yticks(range(len(every)), [name for name, _ in every])
    shown = {f"{value:.0f}" for _, each in every for _, value in each.points}
    for key in sorted(shown & options.keys()):
        axes.plot([], [], color=_COLOURS[options[key]["color"]], linewidth=4, label=options[key]["text"])
    axes.legend(fontsize=5.5, loc="upper right", framealpha=0.8)


def _map(axes: Axes, _panel: Mapping[str, Any], found: Sequence[tuple[str, Sequence[Series]]], start: float) -> None:
    series = sorted((each for _, all_ in found for each in all_), key=lambda each: float(each.labels["le"]))
    times = sorted({at for each in series for at, _ in each.points})
    rows, below = [], dict.fromkeys(times, 0.0)
    for each in series:
        here = dict(each.points)
        rows.append([max(0.0, here.get(at, 0.0) - below[at]) for at in times])
        below = {at: here.get(at, below[at]) for at in times}
    if rows and times:
        extent = (times[0] - start, times[-1] - start, -0.5, len(rows) - 0.5)
        axes.imshow(rows, aspect="auto", origin="lower", cmap="Oranges", extent=extent, interpolation="nearest")
        axes.set_yticks(range(len(series)), [f"{each.labels['le']} s" for each in series])


def _table(axes: Axes, _panel: Mapping[str, Any], found: Sequence[tuple[str, Sequence[Series]]], _start: float) -> None:
    axes.set_axis_off()
    lines = []
    for form, series in found:
        for each in series:
            labels = [
                each.labels[name]
                for name in ("alertname", "severity", "namespace", "projection", "kind", "name")
                if each.labels.get(name)
            ]
            lines.append(f"{' · '.join(labels)}{f'   {form} = {each.points[-1][1]:.0f}' if form else ''}")
    for number, line in enumerate(sorted(set(lines))[:28]):
        axes.text(number // 14 / 2, 1 - number % 14 * 0.07, line, fontsize=5.5, va="top")


_KINDS: Final = {"stat": _number, "state-timeline": _timeline, "heatmap": _map, "table": _table}
