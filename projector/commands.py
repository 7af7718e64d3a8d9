"""The verbs of `projector.ops` as commands. They talk to MongoDB themselves, so they also work while no projector runs.

Exit codes: 0 it is so, or was done; 1 it is not, or could not be done; 2 the command line is wrong.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from pymongo.errors import PyMongoError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from eventstore.client import connect, open_database
from eventstore.logs import redact
from projector import render
from projector.environment import code_of_modules, settings_of_environment
from projector.ops import MAX_PARTITIONS, MAX_WAIT_SECONDS, PAGE, Ops
from projector.refusals import Problem

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from projector.overview import Detail

__all__ = ["COMMANDS"]

LOOK_SECONDS: Final = 0.5
"""How often `rebuild --wait` looks: the projectors report once a second."""

_T = TypeVar("_T")

_output = click.option(
    "--output",
    "-o",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="For people or programs.",
)
_modules = click.option(
    "--module", "modules", multiple=True, help="A Python module with the projection, where it was not declared."
)
_name = click.argument("name")


def perform(verb: Callable[[Ops], Awaitable[_T]], modules: Sequence[str] = ()) -> _T:
    """What a verb answers. Ends the command with exit code 1 and a clear text when it cannot be done."""
    settings, store = settings_of_environment()
    code = code_of_modules(modules)

    async def run() -> _T:
        async with connect(store.mongodb_uri, "projector-command") as client:
            log = open_database(client, store.eventstore_database)
            database = open_database(client, settings.database or store.eventstore_database)
            return await verb(Ops(log, database, lambda: code))

    try:
        return asyncio.run(run())
    except Problem as problem:
        raise click.ClickException(problem.detail) from problem
    except PyMongoError as error:
        raise click.ClickException(f"MongoDB: {redact(str(error)).partition(', Timeout:')[0]}") from error


def say(value: Any, output: str, table: Callable[[Any], Any]) -> None:
    """Prints an answer."""
    if output == "json":
        click.echo(render.json_text(value))
    else:
        render.show(table(value))


@click.command("list")
@_output
def list_command(output: str) -> None:
    """Show all projections: state, lag, aggregates set aside, rebuilds."""
    rows = perform(lambda ops: ops.projections())
    say({"projections": rows} if output == "json" else rows, output, render.summaries)


@click.command()
@_name
@_output
def show(name: str, output: str) -> None:
    """Show everything about a projection."""
    say(perform(lambda ops: ops.show(name)), output, render.detail)


@click.command()
@_name
@_output
def pause(name: str, output: str) -> None:
    """Stop a projection; its read model stays as it is."""
    say(perform(lambda ops: ops.pause(name)), output, lambda row: render.summaries([row]))


@click.command()
@_name
@_output
def resume(name: str, output: str) -> None:
    """Let a projection go on that was paused, or that has failed."""
    say(perform(lambda ops: ops.resume(name)), output, lambda row: render.summaries([row]))


@click.command()
@_name
@click.argument("count", type=click.IntRange(1, MAX_PARTITIONS))
@_output
def partitions(name: str, count: int, output: str) -> None:
    """Let up to COUNT replicas share a projection."""
    say(perform(lambda ops: ops.partitions(name, count)), output, lambda row: render.summaries([row]))


@click.command()
@_name
@click.option("--wait", is_flag=True, help="Show how far it is until readers see it.")
@_modules
@_output
def rebuild(name: str, modules: tuple[str, ...], output: str, *, wait: bool) -> None:
    """Build a projection anew beside the old build, then cut over."""

    async def run(ops: Ops) -> str:
        build = await ops.rebuild(name)
        if wait:
            await _follow(ops, name, build)
        return build

    build = perform(run, modules)
    say({"build": build}, output, lambda _: f"{build} is {'live' if wait else 'being built'}.")


async def _follow(ops: Ops, name: str, build: str) -> None:
    """A progress bar until the build is live. Raises `click.ClickException` when it will not be."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(build, total=100.0, state="waiting for a projector")
        seen = time.monotonic()
        while True:
            found = await ops.show(name)
            if found.live == build:
                progress.update(task, completed=100.0, state="live")
                return
            _check(found, build)
            percent = (found.rebuild or {}).get("percent")
            state = next((each.state for each in found.partition_owners if each.build == build), "not_running")
            if state != "not_running":
                seen = time.monotonic()
            elif time.monotonic() - seen > 60:
                raise click.ClickException(f"{build}: no projector has run it for a minute; it goes on when one does")
            if found.manual_cutover and state == "live":
                progress.update(task, completed=100.0, state=f"ready; `projector cutover {name}` when you are")
                return
            progress.update(task, completed=percent, state=state if percent is None else f"{state} {percent:.0f} %")
            await asyncio.sleep(LOOK_SECONDS)


def _check(found: Detail, build: str) -> None:
    if found.candidate != build:
        raise click.ClickException(f"{build} was given up; {found.live} is live")
    if found.state in {"failed", "paused"}:
        raise click.ClickException(f"{found.name} is {found.state}" + (f": {found.error}" if found.error else ""))


@click.command()
@_name
@_output
def cutover(name: str, output: str) -> None:
    """Let readers see the build that waits for it, once it has caught up."""
    build = perform(lambda ops: ops.cutover(name))
    say({"build": build}, output, lambda _: f"{build} will be live as soon as it has caught up.")


@click.command()
@_name
@_output
def rollback(name: str, output: str) -> None:
    """Let readers see the previous build again, once it has caught up."""
    build = perform(lambda ops: ops.rollback(name))
    say({"build": build}, output, lambda _: f"{build} will be live again as soon as it has caught up.")


@click.command()
@_name
@_output
def cancel(name: str, output: str) -> None:
    """Give up a rebuild or a rollback that readers do not see yet."""
    build = perform(lambda ops: ops.cancel(name))
    say({"build": build}, output, lambda _: f"{build} was given up.")


@click.command()
@_name
@click.option("--yes", is_flag=True, help="Do not ask.")
def drop(name: str, *, yes: bool) -> None:
    """Remove a projection that is no longer run: read model and bookkeeping."""
    if not yes:
        click.confirm(f"Remove the read model of {name} and all its builds?", abort=True)
    perform(lambda ops: ops.drop(name))
    click.echo(f"{name} was removed.")


@click.command()
@_name
@click.argument("aggregate")
@click.argument("sequence_no", metavar="SEQ", type=click.IntRange(min=1))
@click.option(
    "--timeout", type=click.FloatRange(0, MAX_WAIT_SECONDS), default=10.0, show_default=True, help="In seconds."
)
@_modules
@_output
def wait(name: str, aggregate: str, sequence_no: int, *, timeout: float, modules: tuple[str, ...], output: str) -> None:
    """Wait until the read model shows event SEQ of an aggregate: to read one's own write."""
    found = perform(lambda ops: ops.wait(name, aggregate, sequence_no, timeout), modules)
    say(found, output, render.waited)
    sys.exit(0 if found.reached else 1)


@click.command()
@_name
@click.option("--sample", type=click.IntRange(min=1), help="Compare about so many documents. Default: all of them.")
@_modules
@_output
def verify(name: str, sample: int | None, modules: tuple[str, ...], output: str) -> None:
    """Compare a read model with the log: its marks with all heads, its documents with a fresh fold."""
    found = perform(lambda ops: ops.verify(name, sample), modules)
    say(found, output, render.verification)
    sys.exit(0 if found.ok else 1)


@click.group()
def parked() -> None:
    """Aggregates that were set aside because of an event that fails or is missing."""


@parked.command("list")
@_name
@click.option("--after", default="", help="Go on after this record.")
@click.option("--limit", type=click.IntRange(1, 1_000), default=PAGE, show_default=True)
@_output
def parked_list(name: str, after: str, limit: int, output: str) -> None:
    """Show them: at which event, and why."""
    say(perform(lambda ops: ops.parked(name, after=after, limit=limit)), output, render.parked)


@parked.command("retry")
@_name
@click.argument("aggregate", required=False)
@_output
def parked_retry(name: str, aggregate: str | None, output: str) -> None:
    """Try one of them again now, or all."""
    count = perform(lambda ops: ops.retry(name, aggregate))
    say({"retried": count}, output, lambda _: f"{count} will be tried again.")


@parked.command("skip")
@_name
@click.argument("aggregate")
@click.argument("sequence_no", metavar="SEQ", type=click.IntRange(min=1))
@_output
def parked_skip(name: str, aggregate: str, sequence_no: int, output: str) -> None:
    """Pass over the event in an aggregate's way, for good. A rebuild meets it again."""
    perform(lambda ops: ops.skip(name, aggregate, sequence_no))
    say({"skipped": sequence_no}, output, lambda _: f"Event {sequence_no} of {aggregate} will be passed over.")


COMMANDS: Final[tuple[click.Command, ...]] = (
    list_command, show, pause, resume, partitions, rebuild, cutover, rollback, cancel, drop, wait, verify, parked,
)  # fmt: skip
"""All of them, for the command `projector`."""
