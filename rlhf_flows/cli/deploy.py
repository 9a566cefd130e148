"""`rlhf-flows deploy`: all that a Prefect server needs for these flows, in one command."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from rlhf_flows.cli.application import app
from rlhf_flows.cli.server import prefect_client
from rlhf_flows.errors import ConfigError

_STYLES = {"created": "green", "updated": "yellow", "removed": "red", "unchanged": "dim"}


@app.command()
def deploy(
    only: Annotated[
        list[str] | None,
        typer.Option(help="A flow, FLOW/NAME or recipe; may be repeated.", show_default=False),
    ] = None,
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import", help="Flows of yours: a module, or package.module:flow.", show_default=False
        ),
    ] = None,
    work_pool: Annotated[str, typer.Option(help="Made where it is not there.")] = "rlhf-flows",
    limit: Annotated[
        int | None,
        typer.Option(help="Runs of the pool at a time; 1 of a new pool.", min=1),
    ] = None,
    queue: Annotated[
        str | None, typer.Option(help="Of the deployments: high, default or low.")
    ] = None,
    defaults: Annotated[
        str | None, typer.Option(help='A block "RLHF Run Defaults" that all runs take.')
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(help="FLOW/NAME=CRON, or FLOW/NAME=none.", show_default=False),
    ] = None,
    timezone: Annotated[str, typer.Option(help="Of the schedules.")] = "UTC",
    directory: Annotated[
        Path | None, typer.Option(help="Where runs start, on the worker; by default here.")
    ] = None,
    job_variable: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for the work pool, such as image=...", show_default=False),
    ] = None,
    automations: Annotated[
        bool, typer.Option(help="The automations that start crashed runs again.")
    ] = True,
    dry_run: Annotated[bool, typer.Option(help="Say what would be done, and do nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Makes or updates work pool, queues, blocks, deployments, schedules and automations."""
    from rlhf_flows.services.scheduling import parse_schedule

    schedules = [parse_schedule(text, timezone=timezone) for text in schedule or ()]
    variables = _job_variables(job_variable or ())
    with prefect_client() as client:
        from rlhf_flows.deployments.deployed import OWN_DEPLOYMENTS, chosen, of_module
        from rlhf_flows.services.deploying import QUEUES, Wanted, apply, plan

        if queue is not None and queue not in QUEUES:
            raise ConfigError(f"--queue {queue!r} is none of {', '.join(QUEUES)}")
        everything = [*OWN_DEPLOYMENTS, *(d for name in imports or () for d in of_module(name))]
        wanted = Wanted(
            deployments=chosen(everything, only or ()),
            directory=str((directory or Path.cwd()).absolute()),
            work_pool=work_pool,
            limit=limit,
            queue=queue,
            defaults=defaults,
            job_variables=variables,
            schedules=schedules,
            with_automations=automations,
        )
        changes = plan(client, wanted)
        if not dry_run:
            apply(changes)
    if as_json:
        rows = [
            {"kind": c.kind, "name": c.name, "outcome": c.outcome, "detail": c.detail}
            for c in changes
        ]
        typer.echo(json.dumps({"dry_run": dry_run, "changes": rows}, indent=2))
        return
    _print(changes, work_pool, dry_run=dry_run)


def _job_variables(words: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise ConfigError(
                f"--job-variable {word!r} is no variable: write it as KEY=VALUE, such as"
                " image=registry.example.com/rlhf-flows:latest"
            )
        found[name] = yaml.safe_load(text)
    if "env" in found:
        raise ConfigError(
            "--job-variable env would replace the environment that runs need: set variables in the"
            " base job template of the work pool instead"
        )
    return found


def _print(changes: Sequence[Any], work_pool: str, *, dry_run: bool) -> None:
    console = Console()
    table = Table(box=None, pad_edge=False)
    for title in ("", "name", "would be" if dry_run else "", "detail"):
        table.add_column(title, overflow="fold")
    for change in changes:
        style = _STYLES[change.outcome]
        table.add_row(change.kind, change.name, f"[{style}]{change.outcome}", change.detail)
    console.print(table)
    counts = Counter(change.outcome for change in changes)
    if counts.keys() <= {"unchanged"}:
        console.print("nothing to do: all of it is there as it should be")
        return
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    console.print(f"{'would be: ' if dry_run else ''}{said}")
    if not dry_run:
        console.print(
            f"start a worker: prefect worker start --pool {work_pool}",
            highlight=False,
            markup=False,
        )
