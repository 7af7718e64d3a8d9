"""PromQL of the shipped files: where it stands, what it names, and whether that exists."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import promql_parser
import yaml

from deploy.observability.catalogue import RULES, VALUES
from deploy.observability.dashboards import FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Expression", "of_dashboards", "of_rules", "problems", "selectors"]

_VARIABLES: Final = {"$__rate_interval": "5m", "$namespace": ".*", "$instance": ".*", "$projection": ".*"}


@dataclass(frozen=True)
class Expression:
    """An expression and where it stands, for people."""

    where: str
    text: str
    """As it is written, with Grafana's variables."""
    panel: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def filled(self, rate_interval: str = "5m") -> str:
        """With values for Grafana's variables, as Prometheus gets it."""
        text = self.text
        for name, value in (_VARIABLES | {"$__rate_interval": rate_interval}).items():
            text = text.replace(name, value)
        return text


def of_rules() -> Iterator[Expression]:
    """Of alerts and recording rules."""
    for path in sorted(RULES.glob("*.yaml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for number, rule in enumerate(group["rules"]):
                name = rule.get("alert") or rule["record"]
                yield Expression(f"{path.name}: {name} ({number})", rule["expr"])


def of_dashboards() -> Iterator[Expression]:
    """Of panels, annotations and variables (those of variables as the selector that they ask for)."""
    for path in sorted(FOLDER.glob("*.json")):
        document = json.loads(path.read_text())
        for panel in document["panels"]:
            for target in panel.get("targets", ()):
                yield Expression(f"{path.name}: {panel['title']} ({target['refId']})", target["expr"], panel)
        for annotation in document["annotations"]["list"]:
            yield Expression(f"{path.name}: annotation {annotation['name']}", annotation["expr"])
        for variable in document["templating"]["list"]:
            if variable["type"] == "query":
                asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
                assert asked is not None, variable["query"]
                yield Expression(f"{path.name}: variable {variable['name']}", f"count by ({asked[2]}) ({asked[1]})")


def problems(expression: Expression, known: Mapping[str, frozenset[str]]) -> list[str]:
    """What the expression names that does not exist, in words."""
    try:
        parsed = promql_parser.parse(expression.filled())
    except ValueError as error:
        return [f"does not parse: {error}"]
    found: list[str] = []
    _labels(parsed, known, found)
    return found


def selectors(expression: Expression) -> list[Any]:
    """The selectors of series in an expression."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        elif isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)

    promql_parser.walk(promql_parser.parse(expression.filled()), visit)
    return found


def _labels(node: Any, known: Mapping[str, frozenset[str]], found: list[str]) -> frozenset[str]:
    """The labels that a node's series may have; what is wrong is added to `found`."""
    match node:
        case promql_parser.VectorSelector():
            return _selected(node, known, found)
        case promql_parser.MatrixSelector():
            return _selected(node.vector_selector, known, found)
        case promql_parser.AggregateExpr():
            inner = _labels(node.expr, known, found)
            if node.modifier is None:
                return frozenset()
            _check(node.modifier.labels, inner, "grouping", found)
            if node.modifier.type == promql_parser.AggModifierType.By:
                return frozenset(node.modifier.labels)
            return inner - set(node.modifier.labels)
        case promql_parser.BinaryExpr():
            left, right = (_labels(side, known, found) for side in (node.lhs, node.rhs))
            matching = node.modifier.matching if node.modifier is not None else None
            if matching is not None:
                _check(matching.labels, left, "matching, left", found)
                _check(matching.labels, right, "matching, right", found)
            return left | right if str(node.op) == "or" else left or right
        case promql_parser.Call():
            labels = frozenset[str]().union(*(_labels(argument, known, found) for argument in node.args))
            return labels - {"le"} if node.func.name == "histogram_quantile" else labels
        case promql_parser.ParenExpr() | promql_parser.UnaryExpr() | promql_parser.SubqueryExpr():
            return _labels(node.expr, known, found)
    return frozenset()


def _selected(selector: Any, known: Mapping[str, frozenset[str]], found: list[str]) -> frozenset[str]:
    matchers = {matcher.name: matcher for matcher in selector.matchers.matchers}
    names = [selector.name] if selector.name else matchers.pop("__name__").value.split("|")
    labels = frozenset[str]()
    for name in names:
        if name not in known:
            found.append(f"no such metric: {name}")
        labels |= known.get(name, frozenset())
        for matcher in matchers.values():
            closed = VALUES.get((name, matcher.name))
            wanted = frozenset(matcher.value.split("|"))
            if closed is not None and not wanted <= closed:
                found.append(f"never has {matcher.name}: {', '.join(sorted(wanted - closed))}")
    _check(matchers, labels, "selector", found)
    return labels


def _check(names: Any, labels: frozenset[str], what: str, found: list[str]) -> None:
    found.extend(f"no such label ({what}): {name}" for name in names if name not in labels)
