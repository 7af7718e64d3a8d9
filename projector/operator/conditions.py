"""Conditions: what a resource's status says of its state, by the conventions of the Kubernetes API.

Four, always all of them: `Ready` sums up whether users can rely on it, `Progressing` says that work goes on, `Degraded`
that something is wrong that does not mend itself, `Paused` that the operator was told to keep its hands off.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from projector.operator.resource_status import Condition

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["TYPES", "State", "Verdict", "conditions_of", "transitions"]

TYPES: Final = ("Ready", "Progressing", "Degraded", "Paused")
State: TypeAlias = Literal["True", "False", "Unknown"]
_MESSAGE_LIMIT: Final = 2_000


@dataclass(frozen=True)
class Verdict:
    """What a pass found; turned into the four conditions."""

    ready: State
    reason: str
    message: str = ""
    progressing: str = ""
    """Reason and message of what goes on (`BuildingIndexes: status_1 …`); empty when nothing does."""
    degraded: str = ""
    """The same for what is wrong."""
    paused: bool = False


def conditions_of(
    verdict: Verdict, generation: int, before: Iterable[Condition], now: datetime.datetime | None = None
) -> list[Condition]:
    """The conditions that say this; a time of transition stays where the status stays."""
    at = (now or datetime.datetime.now(datetime.UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
    known = {condition.type: condition for condition in before}

    def condition(kind: str, status: State, reason: str, message: str) -> Condition:
        old = known.get(kind)
        return Condition(
            type=kind,
            status=status,
            reason=reason,
            message=message[:_MESSAGE_LIMIT],
            last_transition_time=old.last_transition_time if old and old.status == status else at,
            observed_generation=generation,
        )

    def flag(kind: str, text: str, otherwise: str) -> Condition:
        reason, _, message = text.partition(": ")
        return condition(kind, "True" if text else "False", reason or otherwise, message)

    return [
        condition("Ready", verdict.ready, verdict.reason, verdict.message),
        flag("Progressing", verdict.progressing, "Settled"),
        flag("Degraded", verdict.degraded, "AsExpected"),
        flag("Paused", "Annotation: the operator changes nothing" if verdict.paused else "", "NotPaused"),
    ]


def transitions(before: Sequence[Condition], after: Sequence[Condition]) -> list[Condition]:
    """The conditions whose status or reason has changed, and that are worth an event."""
    known = {condition.type: (condition.status, condition.reason) for condition in before}
    return [
        condition
        for condition in after
        if known.get(condition.type, ("False", "")) != (condition.status, condition.reason)
        # A first Degraded=False is no news, nor is any condition's way back from True, which Ready tells.
        and (condition.type == "Ready" or condition.status == "True")
    ]
