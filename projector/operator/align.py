"""One pass over the indexes of one collection: measure, claim, plan, act, report.

It may run as often as one likes: when all is as it should be, it reads twice and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pymongo.errors import OperationFailure

from projector.operator import measure, ownership
from projector.operator.indexes import ID_INDEX, Action, Index, Step, plan
from projector.operator.resource_status import IndexStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from projector.operator.build import Builder, Target
    from projector.operator.indexes import Found
    from projector.operator.ownership import Claim, Owner

__all__ = ["Alignment", "Wishes", "align", "drop_ours"]

_INDEX_NOT_FOUND: Final = 27
_NAMESPACE_NOT_FOUND: Final = 26
_MESSAGE_LIMIT: Final = 1_000
_ATTEMPTS: Final = frozenset({Action.CREATE, Action.MODIFY, Action.BESIDE, Action.INSTEAD})
"""Steps that an earlier failure may speak against."""


@dataclass(frozen=True)
class Wishes:
    """What a resource wants of a collection's indexes."""

    owner: Owner
    indexes: Sequence[Index]
    recreate: bool = False
    drop_unwanted: bool = False
    keep: Collection[str] = ()
    """Names that are never dropped, whoever owns them."""
    ready_before: Collection[str] = ()
    """Names that were ready at the last look: if one is not now, somebody else changed it."""


@dataclass
class Alignment:
    """What came of it."""

    indexes: list[IndexStatus] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    building: dict[str, measure.Progress | None] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Reason and message for each index that cannot be had."""

    @property
    def ready(self) -> bool:
        """Whether every index is as wanted."""
        return all(index.state == "Ready" for index in self.indexes)

    @property
    def summary(self) -> str:
        """For the printer column: ready of wanted."""
        return f"{sum(index.state == 'Ready' for index in self.indexes)}/{len(self.indexes)}"

    @property
    def problem(self) -> tuple[str, str] | None:
        """The first reason, and all messages."""
        if not self.problems:
            return None
        return self.problems[0][0], "; ".join(message for _, message in self.problems)[:_MESSAGE_LIMIT]


class _Pass:
    """The state of one pass."""

    def __init__(
        self,
        target: Target,
        wishes: Wishes,
        builder: Builder,
        done: Callable[[], None],
        drift: Callable[[str], None],
    ) -> None:
        self.target = target
        self.wishes = wishes
        self.builder = builder
        self.done = done
        self.drift = drift
        self.database = target.mongo.database(target.database)
        self.result = Alignment()
        self.states: dict[str, IndexStatus] = {}
        self.claims: dict[str, Claim] = {}
        self.busy = False
        self.dropped: set[str] = set()

    async def run(self) -> Alignment:
        found = await measure.indexes_of(self.database, self.target.collection) or []
        standing = {one.index.name for one in found}
        self.busy = any(one.build is not None for one in found)
        self.claims = await ownership.claims_on(self.database, self.target.collection)
        ours = [index for index in self.wishes.indexes if await self._claim(index, made=index.name not in standing)]
        steps = plan(ours, found, self._owned(), recreate=self.wishes.recreate)
        await self._tidy(steps, standing)
        building = await self._act(steps)
        if building:
            await self._wait(building, steps)
        self.result.indexes = [self.states[index.name] for index in self.wishes.indexes]
        self._report_foreign(found, steps)
        self.builder.keep(self.target, [step.wanted for step in steps])
        return self.result

    def _owned(self) -> set[str]:
        return {name for name, claim in self.claims.items() if claim.owner.uid == self.wishes.owner.uid}

    async def _claim(self, index: Index, *, made: bool) -> bool:
        """Makes sure that the index is ours; False and a report when it is another resource's."""
        owner, collection = self.wishes.owner, self.target.collection
        claim = self.claims.get(index.name)
        if claim is None:
            claim = await ownership.claim(self.database, collection, index.name, owner, made=made)
        if claim.owner.uid != owner.uid and owner.succeeds(claim.owner):
            claim = await ownership.take_over(self.database, collection, index.name, owner, claim)
        self.claims[index.name] = claim
        if claim.owner.uid == owner.uid:
            return True
        self._problem(
            index.name,
            "Conflict",
            "Conflict",
            f"index {index.name} of {self.target.namespace} belongs to {claim.owner}",
        )
        return False

    async def _act(self, steps: Sequence[Step]) -> list[Index]:
        """Carries the steps out, or starts them; returns the indexes that must be built or are being built."""
        to_build: list[Index] = []
        for step in steps:
            if step.action in _ATTEMPTS and (failure := await self.builder.blocked(self.target, step.wanted)):
                self._problem(step.name, "Failed", failure.reason, failure.message, step)
                continue
            match step.action:
                case Action.KEEP:
                    self._set(step, "Ready")
                case Action.DRIFTED | Action.TAKEN:
                    self._count_drift(step, "blocked")
                    self._blocked(step)
                case Action.WAIT:
                    to_build.append(step.wanted)  # joins the build
                case Action.CREATE:
                    self._count_drift(step, "created")
                    to_build.append(step.wanted)
                case Action.MODIFY:
                    self._count_drift(step, "modified")
                    await self._modify(step)
                case Action.BESIDE | Action.INSTEAD:
                    self._count_drift(step, "replaced")
                    await self._make_room(step)
                    to_build.append(step.wanted)
        return to_build

    async def _wait(self, indexes: Sequence[Index], steps: Sequence[Step]) -> None:
        """Starts the builds, or joins them, and reports those that are not through within a moment."""
        await self.builder.build(self.target, indexes, self.done)
        waiting = {index.name for index in indexes}
        progress: dict[str, measure.Progress] = {}
        if self.builder.running(self.target) & waiting:
            progress = await measure.progress_of(self.target.mongo.client, self.target.database, self.target.collection)
        standing = {
            one.index.name: one for one in await measure.indexes_of(self.database, self.target.collection) or []
        }
        for step in steps:
            name = step.wanted.name
            if name not in waiting:
                continue
            here = standing.get(name)
            if here is not None and here.build is None and not step.wanted.differences(here.index):
                self._set(step, "Ready")
            elif failure := self.builder.failure(self.target, step.wanted):
                self._problem(step.name, "Failed", failure.reason, failure.message, step)
            elif here is None and name not in self.builder.running(self.target):
                self._pending(step)
            else:
                self._building(step, progress.get(name))

    async def _modify(self, step: Step) -> None:
        """collMod: at once for what is only noted, in the background for unique."""
        if self.busy:
            self._pending(step)  # the server refuses collMod while an index of the collection is being built
            return
        quick: dict[str, Any] = {}
        if "hidden" in step.differing:
            quick["hidden"] = step.wanted.hidden
        if "expireAfterSeconds" in step.differing:
            quick["expireAfterSeconds"] = step.wanted.expire_after_seconds
        if quick:
            await self.database.command(
                "collMod",
                self.target.collection,
                index={"name": step.wanted.name} | quick,
                writeConcern={"w": "majority"},
            )
        if "unique" not in step.differing:
            self._set(step, "Ready")
            return
        await self.builder.make_unique(self.target, step.wanted, self.done)
        if step.wanted.name in self.builder.running(self.target):
            self._building(step, None)
        elif failure := self.builder.failure(self.target, step.wanted):
            self._problem(step.name, "Failed", failure.reason, failure.message, step)
        else:
            self._pending(step)

    async def _make_room(self, step: Step) -> None:
        """Claims the other name of a replacement, or drops what it cannot stand beside."""
        if step.action is Action.INSTEAD and step.found is not None:
            await self._drop(step.found.index.name)
        elif step.wanted.name not in self.claims:
            self.claims[step.wanted.name] = await ownership.claim(
                self.database, self.target.collection, step.wanted.name, self.wishes.owner, made=True
            )

    async def _tidy(self, steps: Sequence[Step], standing: Collection[str]) -> None:
        """Drops what a replacement left behind, and gives up what is no longer wanted."""
        for step in steps:
            for name in step.leftovers:
                await self._drop(name)
                self.drift("dropped")
        in_use = {index.name for index in self.wishes.indexes} | {step.wanted.name for step in steps}
        in_use |= {step.found.index.name for step in steps if step.found is not None}
        unwanted = self._owned() - in_use
        for name in sorted(unwanted - set(self.wishes.keep) - {ID_INDEX}):
            if self.wishes.drop_unwanted and self.claims[name].made and name in standing:
                await self._drop(name)
                self.drift("dropped")
        if unwanted:
            await ownership.release(self.database, self.target.collection, unwanted, self.wishes.owner)
            for name in unwanted:
                del self.claims[name]

    async def _drop(self, name: str) -> None:
        await _drop(self.target, name)
        self.dropped.add(name)

    def _report_foreign(self, found: Sequence[Found], steps: Sequence[Step]) -> None:
        known = {index.name for index in self.wishes.indexes} | set(self.claims) | {ID_INDEX}
        known |= {step.wanted.name for step in steps} | self.dropped
        self.result.foreign = sorted(one.index.name for one in found if one.index.name not in known)

    def _blocked(self, step: Step) -> None:
        """Reports an index that cannot become what is wanted."""
        if step.found is None:
            raise AssertionError("a blocked step names what is in the way")
        logical, other = step.name, step.found.index.name
        if step.action is Action.TAKEN:
            message = f"index {logical}: {other} has the same keys and options. Give it that name in the spec, or drop {other}"
            self._problem(logical, "Failed", "IndexOptionsConflict", message, step)
            return
        what = ", ".join(step.differing)
        remedy = "allowRecreate would let the operator build it anew"
        if logical in self.wishes.ready_before or self.claims[logical].made:
            self._problem(
                logical, "Drifted", "DriftDetected", f"index {other} differs from the spec in {what}; {remedy}", step
            )
        else:
            reason = "IndexKeySpecsConflict" if "keys" in step.differing else "IndexOptionsConflict"
            self._problem(
                logical,
                "Drifted",
                reason,
                f"an index {other} was there before and differs from the spec in {what}; {remedy}",
                step,
            )

    def _count_drift(self, step: Step, action: str) -> None:
        if step.name in self.wishes.ready_before:
            self.drift(action)

    def _pending(self, step: Step) -> None:
        self._set(step, "Pending", "waits for other work on this collection")
        self.result.building[step.name] = None

    def _building(self, step: Step, progress: measure.Progress | None) -> None:
        self._set(step, "Building", progress.phase if progress else "")
        self.result.building[step.name] = progress

    def _set(self, step: Step, state: Any, message: str = "") -> None:
        actual = step.wanted.name
        self.states[step.name] = IndexStatus(
            name=step.name, state=state, index=actual if actual != step.name else None, message=message
        )

    def _problem(self, name: str, state: Any, reason: str, message: str, step: Step | None = None) -> None:
        self.result.problems.append((reason, message))
        if step is None:
            self.states[name] = IndexStatus(name=name, state=state, message=message)
        else:
            self._set(step, state, message)


async def align(
    target: Target,
    wishes: Wishes,
    builder: Builder,
    done: Callable[[], None],
    drift: Callable[[str], None] = lambda _action: None,
) -> Alignment:
    """Brings the indexes of a collection to what a resource wants, as far as that can be done now.

    `done` is called when a build that was started or joined here has ended: then another pass is due. `drift` is called
    with what is done about an index that was ready before. Raises what pymongo raises when the server cannot be asked.
    """
    return await _Pass(target, wishes, builder, done, drift).run()


async def drop_ours(target: Target, owner: Owner, keep: Mapping[str, Any] | Collection[str] = ()) -> None:
    """Drops every index of a collection that the operator made for a resource, but for those in `keep`."""
    database = target.mongo.database(target.database)
    claims = await ownership.claims_on(database, target.collection)
    for name, claim in sorted(claims.items()):
        if claim.owner.uid == owner.uid and claim.made and name not in keep and name != ID_INDEX:
            await _drop(target, name)


async def _drop(target: Target, name: str) -> None:
    """Drops an index; that it is gone already is as good."""
    try:
        await target.mongo.database(target.database).command(
            "dropIndexes", target.collection, index=name, writeConcern={"w": "majority"}
        )
    except OperationFailure as error:
        if error.code not in {_INDEX_NOT_FOUND, _NAMESPACE_NOT_FOUND}:
            raise
