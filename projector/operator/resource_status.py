"""The statuses of the custom resources as models: what the operator says in them, and what their schemas are made of."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta, field

from projector.operator.resources import INT32, INT64, MAP_BY_NAME, Model

__all__ = ["Condition", "EventStoreStatus", "IndexStatus", "ProjectionStatus"]

_MAP_BY_TYPE: Final = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}


class Condition(Model, frozen=True, kw_only=True):
    """One aspect of a resource's state."""

    type: Annotated[str, Meta(min_length=1, max_length=316, description="Ready, Progressing, Degraded or Paused.")]
    status: Annotated[Literal["True", "False", "Unknown"], Meta(description="Whether it holds.")]
    reason: Annotated[str, Meta(min_length=1, max_length=1024, description="Why, in one word.")]
    message: Annotated[str, Meta(max_length=32768, description="Why, for people.")] = ""
    last_transition_time: Annotated[
        str, Meta(description="When the status last changed.", extra_json_schema={"format": "date-time"})
    ]
    observed_generation: Annotated[
        int, Meta(ge=0, description="The generation of the spec that this is about.", extra_json_schema=INT64)
    ]


class IndexStatus(Model, frozen=True, kw_only=True):
    """What became of an index."""

    name: Annotated[str, Meta(description="Name in the spec.")]
    state: Annotated[
        Literal["Ready", "Pending", "Building", "Failed", "Drifted", "Conflict"],
        Meta(description="`Drifted`: it exists with other options. `Conflict`: another resource owns it."),
    ]
    index: Annotated[str, Meta(description="Name in MongoDB, where it is another one.")] | None = None
    message: Annotated[str, Meta(description="Why it is not ready.")] = ""


class EventStoreStatus(Model, frozen=True, kw_only=True):
    """What the operator found."""

    observed_generation: Annotated[
        int, Meta(description="Generation that was reconciled last.", extra_json_schema=INT64)
    ] = 0
    conditions: Annotated[
        list[Condition], Meta(description="Ready, Progressing, Degraded, Paused.", extra_json_schema=_MAP_BY_TYPE)
    ] = field(default_factory=list)
    indexes: Annotated[
        list[IndexStatus], Meta(description="Each index of the spec.", extra_json_schema=MAP_BY_NAME)
    ] = field(default_factory=list)
    index_summary: Annotated[str, Meta(description="Ready indexes of those wanted.")] = ""
    foreign_indexes: Annotated[
        list[str], Meta(description="Indexes of the collection that no resource owns; never touched.")
    ] = field(default_factory=list)


class ProjectionStatus(Model, frozen=True, kw_only=True):
    """What the operator and the projector found."""

    observed_generation: Annotated[
        int, Meta(description="Generation that was reconciled last.", extra_json_schema=INT64)
    ] = 0
    conditions: Annotated[
        list[Condition], Meta(description="Ready, Progressing, Degraded, Paused.", extra_json_schema=_MAP_BY_TYPE)
    ] = field(default_factory=list)
    indexes: Annotated[
        list[IndexStatus], Meta(description="Each index of the spec.", extra_json_schema=MAP_BY_NAME)
    ] = field(default_factory=list)
    foreign_indexes: Annotated[
        list[str], Meta(description="Indexes of the collection that no resource owns; never touched.")
    ] = field(default_factory=list)
    collection: Annotated[str, Meta(description="Collection behind the view.")] | None = None
    version: Annotated[int, Meta(description="Version that is being read.", extra_json_schema=INT32)] | None = None
    state: Annotated[str, Meta(description="What the projector says of itself.")] | None = None
    lag_seconds: (
        Annotated[
            int,
            Meta(
                description="Age of the oldest event not yet applied: at least so much; 0 below a second.",
                extra_json_schema=INT64,
            ),
        ]
        | None
    ) = None
    parked: (
        Annotated[
            int, Meta(description="Aggregates set aside because an event of theirs fails.", extra_json_schema=INT64)
        ]
        | None
    ) = None
    rebuild_percent: (
        Annotated[int, Meta(description="Progress of a rebuild, coarse.", extra_json_schema=INT32)] | None
    ) = None
