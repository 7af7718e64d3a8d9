"""What all dashboards have in common: variables, links, and panels that name their question, their unit and their queries.

Grafana's rules (dashboard-linter) hold by construction: a data source variable, `namespace` and `instance`, a description
and a unit on every panel, references of queries, not editable, stable uids.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as prometheus_models

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "BAD_RATIO",
    "NAMESPACE",
    "RATE",
    "SELECTOR",
    "TAG",
    "bars",
    "board",
    "encode",
    "lines",
    "map_of",
    "number",
    "process_rows",
    "rows",
    "states",
    "thresholds",
]

TAG: Final = "eventprojector"
SOURCE: Final = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
NAMESPACE: Final = 'namespace=~"$namespace"'
SELECTOR: Final = f'{NAMESPACE}, instance=~"$instance"'
RATE: Final = "[$__rate_interval]"
BAD_RATIO: Final = (
    f"sum(namespace:appender_bad_requests:rate5m{{{NAMESPACE}}})"
    f" / sum(namespace:appender_requests:rate5m{{{NAMESPACE}}})"
)

_LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _queries(panel: Any, queries: Mapping[str, str], *, instant: bool = False, **more: Any) -> Any:
    """Adds the queries, by legend."""
    for letter, (legend, expression) in zip(_LETTERS, queries.items(), strict=False):
        query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(letter).datasource(SOURCE)
        query = query.instant() if instant else query.range()
        if "format_val" in more:
            query = query.format(more["format_val"])
        panel = panel.with_target(query)
    return panel


def _dress(panel: Any, title: str, description: str, unit: str, span: int, height: int) -> Any:
    return panel.title(title).description(description).unit(unit).datasource(SOURCE).span(span).height(height)


def thresholds(*steps: tuple[float | None, str]) -> dashboard.ThresholdsConfig:
    """Colours from values on; the first value is None."""
    return (
        dashboard.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value=value, color=color) for value, color in steps])
    )


def lines(
    title: str,
    description: str,
    unit: str,
    queries: Mapping[str, str],
    *,
    span: int = 8,
    stacked: bool = False,
    most: float | None = None,
    limits: dashboard.ThresholdsConfig | None = None,
) -> Any:
    """Values over time."""
    panel = (
        _dress(timeseries.Panel(), title, description, unit, span, 8)
        .min(0)
        .line_width(1)
        .fill_opacity(25 if stacked else 8)
        .show_points(common_models.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_models.TooltipDisplayMode.MULTI)
            .sort(common_models.SortOrder.DESCENDING)
        )
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    if most is not None:
        panel = panel.max(most)
    if limits is not None:
        panel = panel.thresholds(limits).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.LINE)
        )
    return _queries(panel, queries)


def number(
    title: str,
    description: str,
    unit: str,
    expression: str,
    limits: dashboard.ThresholdsConfig,
    *,
    span: int = 6,
    empty: str | None = None,
) -> Any:
    """One figure, with its course behind it. `empty` is shown where the query finds nothing, which must then be no fault."""
    panel = (
        _dress(stat.Panel(), title, description, unit, span, 4)
        .thresholds(limits)
        .graph_mode(common_models.BigValueGraphMode.AREA)
        .color_mode(common_models.BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    if empty is not None:
        panel = panel.no_value(empty)
    return _queries(panel, {title: expression})


def bars(title: str, description: str, unit: str, queries: Mapping[str, str], *, span: int = 8) -> Any:
    """The values of now, side by side."""
    panel = (
        _dress(bargauge.Panel(), title, description, unit, span, 8)
        .min(0)
        .orientation(common_models.VizOrientation.HORIZONTAL)
        .display_mode(common_models.BarGaugeDisplayMode.BASIC)
        .name_placement(common_models.BarGaugeNamePlacement.LEFT)
        .value_mode(common_models.BarGaugeValueMode.TEXT)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(thresholds((None, "green")))
    )
    return _queries(panel, queries, instant=True)


def map_of(title: str, description: str, unit: str, expression: str, *, span: int = 8) -> Any:
    """A histogram's buckets over time."""
    panel = (
        _dress(heatmap.Panel(), title, description, unit, span, 8)
        .calculate(False)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .color(heatmap.HeatmapColorOptions().scheme("Oranges").steps(64))
        .cell_gap(1)
    )
    return _queries(panel, {"{{le}}": expression}, format_val=prometheus_models.PromQueryFormat.HEATMAP)


def states(
    title: str, description: str, names: Sequence[tuple[str, str]], queries: Mapping[str, str], *, span: int = 24
) -> Any:
    """States over time; the value n is shown as the n-th of `names`, which are pairs of text and colour."""
    options = {
        str(index): models.ValueMappingResult(text=text, color=color, index=index)
        for index, (text, color) in enumerate(names)
    }
    panel = (
        _dress(statetimeline.Panel(), title, description, "short", span, 8)
        .mappings([models.ValueMap(options=options)])
        .show_value(common_models.VisibilityMode.AUTO)
        .merge_values(True)
        .row_height(0.8)
        .fill_opacity(80)
    )
    return _queries(panel, queries)


def rows(
    title: str,
    description: str,
    queries: Mapping[str, str],
    names: Mapping[str, str],
    *,
    hidden: Iterable[str] = (),
    link: tuple[str, str, str] | None = None,
    span: int = 24,
) -> Any:
    """The labels of what the queries find now, one row each; `names` renames the columns, whose order it gives.

    `link` is a column, and title and address of the link that its values are.
    """
    panel = _dress(table.Panel(), title, description, "short", span, 8).filterable(True)
    panel = _queries(panel, queries, instant=True, format_val=prometheus_models.PromQueryFormat.TABLE)
    exclude = dict.fromkeys(("Time", *hidden), True)
    if link is not None:
        column, text, url = link
        value = models.DynamicConfigValue(id_val="links", value=[{"title": text, "url": url, "targetBlank": True}])
        panel = panel.override_by_name(column, [value])
    return panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={})).with_transformation(
        models.DataTransformerConfig(
            id_val="organize",
            options={
                "excludeByName": exclude,
                "indexByName": {name: index for index, name in enumerate(names)},
                "renameByName": dict(names),
            },
        )
    )


def process_rows(build_info: str) -> list[Any]:
    """Panels of the Python processes that export `build_info`."""

    def ours(metric: str) -> str:
        series = f"rate({metric}{{{SELECTOR}}}{RATE})" if metric.endswith("_total") else f"{metric}{{{SELECTOR}}}"
        return f"{series} and on (namespace, instance) {build_info}{{{SELECTOR}}}"

    return [
        lines(
            "Memory",
            "Resident memory. Caches and queues have bounds, so that it becomes flat.",
            "bytes",
            {"{{instance}}": ours("process_resident_memory_bytes")},
            span=6,
        ),
        lines(
            "CPU",
            "Cores in use. A process has one event loop: at one core it is at its limit.",
            "short",
            {"{{instance}}": ours("process_cpu_seconds_total")},
            span=6,
        ),
        lines(
            "File descriptors",
            "Open ones, connections among them, and the most that the process may have.",
            "short",
            {"{{instance}} open": ours("process_open_fds"), "{{instance}} most": ours("process_max_fds")},
            span=6,
        ),
        lines(
            "Garbage collections",
            "Of Python's collector, by generation.",
            "cps",
            {"{{instance}} generation {{generation}}": ours("python_gc_collections_total")},
            span=6,
        ),
    ]


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .query(query)
        .datasource(SOURCE)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )


def board(
    name: str,
    title: str,
    description: str,
    metric: str,
    sections: Mapping[str, Sequence[Any]],
    *,
    per: str | None = None,
) -> dashboard.Dashboard:
    """A dashboard of rows of panels. `metric` is what tells namespaces and instances; `per` is a label to choose by besides."""
    made = (
        dashboard.Dashboard(f"Eventprojector / {title}")
        .uid(f"eventprojector-{name}")
        .description(description)
        .tags([TAG])
        .readonly()
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("Eventprojector")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("namespace", "Namespace", f"label_values({metric}, namespace)"))
        .with_variable(_variable("instance", "Instance", f"label_values({_narrowed(metric, NAMESPACE)}, instance)"))
        .annotation(
            dashboard.AnnotationQuery()
            .name("New version")
            .datasource(SOURCE)
            .enable(True)
            .icon_color("blue")
            .expr(_new_version())
        )
    )
    if per is not None:
        made = made.with_variable(
            _variable(per, per.capitalize(), f"label_values({_narrowed(metric, SELECTOR)}, {per})")
        )
    for section, panels in sections.items():
        made = made.with_row(dashboard.Row(section))
        for panel in panels:
            made = made.with_panel(panel)
    return made


def _narrowed(metric: str, selector: str) -> str:
    """The metric with a selector more."""
    return f"{metric[:-1]}, {selector}}}" if metric.endswith("}") else f"{metric}{{{selector}}}"


def _new_version() -> str:
    """Versions that were not there five minutes ago."""
    found = '{__name__=~"appender_build_info|projector_build_info|indexer_build_info", namespace=~"$namespace"}'
    return f"count by (version) ({found}) unless count by (version) ({found} offset 5m)"


def encode(made: dashboard.Dashboard) -> str:
    """The JSON that is committed: panels numbered, since links and embeds name them."""
    document = json.loads(json.dumps(made.build(), cls=JSONEncoder))
    for number_, panel in enumerate(document["panels"], start=1):
        panel["id"] = number_
    return json.dumps(document, indent=1, sort_keys=True) + "\n"
