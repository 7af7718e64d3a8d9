"""A projection in Python: what each product sold. One order goes to the documents of all its products.

projector run --module examples.shop.sales
"""

from __future__ import annotations

import msgspec

from projector.projection import IndexSpec, Projection, State

sales = Projection(
    "sales",
    version=1,
    key="$payload.items.productId",  # an array: an event goes to several documents
    indexes=[IndexSpec(keys={"revenueCents": -1})],
    fields=["payload.items"],
)


class Item(msgspec.Struct, rename="camel"):
    """A line of an order."""

    product_id: str
    quantity: int
    price_cents: int


class OrderPlaced(msgspec.Struct):
    """The part of an order's payload that is read here."""

    items: list[Item]


@sales.on("OrderPlaced")
def placed(state: State, order: OrderPlaced) -> None:
    """Adds the order's lines of this product."""
    for item in order.items:
        if item.product_id == state["_id"]:
            state["sold"] = state.get("sold", 0) + item.quantity
            state["revenueCents"] = state.get("revenueCents", 0) + item.quantity * item.price_cents
    state["orders"] = state.get("orders", 0) + 1
