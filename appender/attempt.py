"""One attempt at a batch: number its events on top of the heads, write them, hear what became of each request."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from pymongo.errors import PyMongoError

from appender.lanes import Batch, Kind
from appender.write import OPERATION_SECONDS, Outcome, document, insert_each, insert_in
from eventstore import log
from eventstore.client import MAJORITY

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from pymongo.asynchronous.client_session import AsyncClientSession

    from appender.encoding import Append
    from appender.heads import Heads
    from appender.lanes import Request
    from eventstore.client import Client, Database

__all__ = ["Attempt"]


class Attempt:
    """The attempt's findings: `known` heads (read with majority), `outcomes` by request, aggregates that `failed`.

    `sent` says that something is on its way that may be written whatever is heard of it.
    """

    __slots__ = (
        "_client",
        "_database",
        "_end_later",
        "_heads",
        "_ordered",
        "batch",
        "failed",
        "known",
        "outcomes",
        "planned",
        "sent",
    )

    def __init__(
        self,
        client: Client,
        database: Database,
        heads: Heads,
        batch: Batch,
        end_later: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._client = client
        self._end_later = end_later
        self._database = database
        self._heads = heads
        self.batch = batch
        self.known: dict[str, int] = {}
        self.planned: list[Request] = []
        self.outcomes: list[tuple[Request, Outcome]] = []
        self.failed: set[str] = set()
        self.sent = False
        self._ordered = False

    async def write(self) -> None:
        """Writes what has no outcome yet. Raises what pymongo raises, and TimeoutError; then `fail_all` has the rest."""
        if self.batch.kind is Kind.ATOMIC:
            await self._write_atomic()
        else:
            await self._write_singles()

    async def _write_singles(self) -> None:
        await self._read_heads()
        documents = self._number(self.known)
        if not documents:
            return
        self.sent = True
        outcomes = await insert_each(self._database, documents, ordered=self._ordered)
        self.sent = False
        self.outcomes = list(zip(self.planned, outcomes, strict=True))
        if any(outcome is not Outcome.WRITTEN for outcome in outcomes):
            self._note_failures()

    async def _write_atomic(self) -> None:
        if not self.batch.contended:
            await self._read_heads()
        session = self._client.start_session()
        try:
            await self._transact(session)
        finally:
            if session.in_transaction:  # failed or cut short: the abort may have to wait for a server that is gone
                self._end_later(session.end_session())
            else:
                await session.end_session()

    async def _transact(self, session: AsyncClientSession) -> None:
        await session.start_transaction(write_concern=MAJORITY, max_commit_time_ms=int(OPERATION_SECONDS * 1000))
        if self.batch.contended:
            # Read in the transaction: it sees the newest head, and nothing can come between it and the insert.
            wanted = [lane.aggregate_id for lane in self.batch.lanes]
            found = await log.heads(self._database, wanted, session)
            documents = self._number({aggregate_id: found.get(aggregate_id, 0) for aggregate_id in wanted})
        else:
            documents = self._number(self.known)
        if not documents:
            return
        if (refused := await insert_in(session, self._database, documents)) is not None:
            self._aborted(*refused)
            return
        self.sent = True
        try:
            await session.commit_transaction()
        except PyMongoError as error:
            self.sent = not error.has_error_label("TransientTransactionError")
            raise
        self.sent = False
        self.outcomes = [(request, Outcome.WRITTEN) for request in self.planned]

    async def _read_heads(self) -> None:
        """Completes `known` by the cache, and by one read for all that it lacks."""
        known, misses = self.known, []
        for request in self.batch.requests:
            if request.finished:
                continue
            for append in request.appends:
                aggregate_id = append.aggregate_id
                if aggregate_id in known:
                    continue
                head = self._heads.get(aggregate_id)
                if head is not None:
                    known[aggregate_id] = head
                elif append.expected == 0:
                    known[aggregate_id] = 0  # the unique index tells if it is not new; number 1 never leaves a gap
                else:
                    known[aggregate_id] = 0
                    misses.append(aggregate_id)
        if misses:
            known.update(await log.heads(self._database, misses))

    def _number(self, heads: dict[str, int]) -> list[dict[str, Any]]:
        """Gives out numbers, in order; a request whose expectation fails closes its lanes until it is looked up."""
        next_heads = dict(heads)
        closed: set[str] = set()
        taken: set[str] = set()
        documents: list[dict[str, Any]] = []
        atomic = self.batch.kind is Kind.ATOMIC
        for request in self.batch.requests:
            if request.finished:
                continue
            if closed and any(append.aggregate_id in closed for append in request.appends):
                continue
            if not self._may_go(request, next_heads, taken if atomic else None):
                request.look_up = True
                closed.update(append.aggregate_id for append in request.appends)
                continue
            self.planned.append(request)
            for append in request.appends:
                aggregate_id = append.aggregate_id
                number = next_heads[aggregate_id]
                if number != heads[aggregate_id]:
                    self._ordered = True  # two documents of one aggregate: the server must stop at the first that fails
                append.first = number + 1
                for event in append.events:
                    number += 1
                    documents.append(document(event, aggregate_id, number))
                next_heads[aggregate_id] = number
        return documents

    @staticmethod
    def _may_go(request: Request, heads: dict[str, int], taken: set[str] | None) -> bool:
        """Whether its expectations hold, and no eventId of it stands in the same transaction already."""
        for append in request.appends:
            if append.expected is not None and append.expected != heads[append.aggregate_id]:
                return False
        if taken is not None:
            ids = {event.event_id for append in request.appends for event in append.events if event.given_id}
            if not taken.isdisjoint(ids):
                return False
            taken |= ids
        return True

    def _note_failures(self) -> None:
        """After singles: what to look up, which heads were wrong, which lanes must wait."""
        seen_id = False
        for request, outcome in self.outcomes:
            if outcome is Outcome.WRITTEN:
                continue
            if outcome is Outcome.NOT_TRIED:
                # Behind a repeat there are often more of them: look them all up in one go.
                request.look_up = request.look_up or (seen_id and request.appends[0].events[0].given_id)
                continue
            seen_id = seen_id or outcome is Outcome.EVENT_ID_TAKEN
            self._fail(request, outcome)

    def _aborted(self, index: int, outcome: Outcome) -> None:
        """After a refused insert of a transaction: nothing is written, and one request is known to be the reason."""
        position = 0
        for request in self.planned:
            position += request.events
            if index < position:
                self.outcomes.append((request, outcome))
                self._fail(request, outcome)
                index = 1 << 62
            else:
                self.outcomes.append((request, Outcome.NOT_TRIED))
                if outcome is Outcome.EVENT_ID_TAKEN:
                    request.look_up = request.look_up or any(e.given_id for a in request.appends for e in a.events)
                for append in request.appends:
                    self._heads.forget(append.aggregate_id)

    def fail_all(self, outcome: Outcome) -> None:
        """The same for every request that was planned, or for all of them when nothing was planned yet."""
        requests = self.planned or [request for request in self.batch.requests if not request.finished]
        self.outcomes = [(request, outcome) for request in requests]
        for request in requests:
            self._fail(request, outcome)

    def _fail(self, request: Request, outcome: Outcome) -> None:
        if outcome is Outcome.UNKNOWN:
            request.uncertain = request.look_up = True
        elif outcome in {Outcome.NUMBER_TAKEN, Outcome.EVENT_ID_TAKEN}:
            request.look_up = True
        for append in request.appends:
            if outcome is Outcome.NUMBER_TAKEN and append.first != 1:
                self._heads.conflicted(append.aggregate_id)
            else:
                self._heads.forget(append.aggregate_id)
            self.failed.add(append.aggregate_id)

    def reasons(self) -> Counter[Outcome]:
        """How many requests must be tried again, by reason."""
        return Counter(
            outcome
            for _, outcome in self.outcomes
            if outcome not in {Outcome.WRITTEN, Outcome.NOT_TRIED, Outcome.REFUSED}
        )

    def written(self) -> Iterator[Append]:
        """The appends that this attempt wrote, in order."""
        for request, outcome in self.outcomes:
            if outcome is Outcome.WRITTEN:
                yield from request.appends
