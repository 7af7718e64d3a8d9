"""The examples: they load, and what they fold from their logs is what a fold by other means says."""

from __future__ import annotations

import collections
import csv
import datetime
import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from projector.loader import distinct, load_file, load_folder, load_modules
from tests.conftest import missing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from projector.projection import Event, Projection, State

ROOT = Path(__file__).parents[2]
SHOP = ROOT / "examples" / "shop"
RECEIPT = ROOT.parent / "shared" / "data" / "receipt.csv"


def fold(projection: Projection, events: Iterable[Event]) -> dict[Any, State]:
    documents: dict[Any, State] = {}
    for event in events:
        for key in projection.keys(event) if projection.handles(event["eventName"]) else ():
            state = projection.apply(key, documents.pop(key, None), event)
            if state is not None:
                documents[key] = state
    return documents


@pytest.fixture(scope="module")
def events() -> list[Event]:
    lines = [json.loads(line) for line in (SHOP / "events.ndjson").read_text().splitlines()]
    return [line | {"timestamp": datetime.datetime.fromisoformat(line["timestamp"])} for line in lines]


@pytest.fixture(scope="module")
def documents(events: list[Event]) -> dict[str, dict[Any, State]]:
    projections = distinct([*load_folder(SHOP / "projections"), *load_modules(["examples.shop.sales"])])
    return {projection.name: fold(projection, events) for projection in projections}


def named(events: list[Event], name: str) -> list[Event]:
    return [event for event in events if event["eventName"] == name]


def test_the_log_is_in_order_within_aggregates_and_not_across_them(events: list[Event]) -> None:
    assert len({event["eventId"] for event in events}) == len(events)
    assert any(one["timestamp"] > other["timestamp"] for one, other in itertools.pairwise(events))
    last: dict[str, datetime.datetime] = {}
    for event in events:
        assert event["timestamp"] >= last.get(event["aggregateId"], event["timestamp"])
        last[event["aggregateId"]] = event["timestamp"]


def test_an_order_is_worth_its_items(events: list[Event], documents: dict[str, dict[Any, State]]) -> None:
    orders = documents["orders"]
    assert orders.keys() == {event["aggregateId"] for event in named(events, "OrderPlaced")}
    for order in orders.values():
        assert order["totalCents"] == sum(item["quantity"] * item["priceCents"] for item in order["items"])
        assert order.get("paidCents", order["totalCents"]) == order["totalCents"]


def test_a_customer_spent_what_was_paid(events: list[Event], documents: dict[str, dict[Any, State]]) -> None:
    spent: collections.Counter[str] = collections.Counter()
    for event in named(events, "PaymentReceived"):
        spent[event["payload"]["customerId"]] += event["payload"]["amountCents"]
    assert {key: c["spentCents"] for key, c in documents["customers"].items() if "spentCents" in c} == spent


def test_what_is_in_stock_came_and_did_not_go(events: list[Event], documents: dict[str, dict[Any, State]]) -> None:
    stock: collections.Counter[str] = collections.Counter()
    for event in events:
        stock[event["aggregateId"]] += event["payload"].get("change", 0)
    withdrawn = {event["aggregateId"] for event in named(events, "ProductWithdrawn")}
    listed = {event["aggregateId"] for event in named(events, "ProductListed")}
    assert {key: p["available"] for key, p in documents["products"].items()} == {
        k: stock[k] for k in listed - withdrawn
    }


def test_products_sold_what_orders_say(events: list[Event], documents: dict[str, dict[Any, State]]) -> None:
    sold: collections.Counter[str] = collections.Counter()
    for event in named(events, "OrderPlaced"):
        for item in event["payload"]["items"]:
            sold[item["productId"]] += item["quantity"]
    assert {key: product["sold"] for key, product in documents["sales"].items()} == sold


def test_permits_are_what_the_receipt_log_says() -> None:
    if not RECEIPT.exists():
        missing(f"the receipt log is not at {RECEIPT.name}")
    with RECEIPT.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows.sort(key=lambda row: datetime.datetime.fromisoformat(row["time:timestamp"]))
    cases: dict[str, list[dict[str, str]]] = collections.defaultdict(list)
    for row in rows:
        cases[row["case:concept:name"]].append(row)
    [permits] = load_file(ROOT / "examples" / "receipt" / "permits.yaml")
    documents = fold(
        permits,
        (
            {
                "aggregateId": row["case:concept:name"],
                "eventName": row["concept:name"],
                "timestamp": datetime.datetime.fromisoformat(row["time:timestamp"]),
                "payload": row,
            }
            for row in rows
        ),
    )
    assert documents.keys() == cases.keys()
    for case, history in cases.items():
        permit = documents[case]
        assert permit["events"] == len(history)
        assert permit["firstEvent"] == history[0]["concept:name"]
        assert permit["lastEvent"] == history[-1]["concept:name"]
        assert permit["lastAt"] == datetime.datetime.fromisoformat(history[-1]["time:timestamp"])
        assert permit["resources"] == list(dict.fromkeys(row["org:resource"] for row in history))
        confirmation = [row for row in history if row["concept:name"] == "Confirmation of receipt"]
        assert permit.get("group") == (confirmation[-1]["org:group"] if confirmation else None)


def test_what_the_reference_shows_can_be_run(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "reference" / "projections.md").read_text()
    blocks: dict[str, list[str]] = collections.defaultdict(list)
    for language, block in re.findall(r"^```(yaml|python)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        blocks[language].append(block)
    (tmp_path / "permits.yaml").write_text("---\n".join(blocks["yaml"]))
    [declared] = load_folder(tmp_path)
    assert declared.name == "permits"
    module: dict[str, Any] = {"__name__": "shown"}
    exec("import msgspec\n" + "\n".join(blocks["python"]), module)
    event = {"eventName": "Confirmed", "payload": {"orgGroup": "Group 1"}}
    assert module["permits"].apply("k", None, event) == {"_id": "k", "group": "Group 1"}
