"""`rlhf-flows doctor`: is everything there that a run needs?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from rlhf_flows.cli.answers import AsJson, StoreUrl, print_json
from rlhf_flows.cli.application import app
from rlhf_flows.services.environment import prepare_environment

_COLOURS = {"ok": "green", "warning": "yellow", "wrong": "red"}


@app.command()
def doctor(
    store: StoreUrl = "runs",
    address: Annotated[str | None, typer.Option(help="host:port of a Ray head.")] = None,
    as_json: AsJson = False,
) -> None:
    """Looks at Python, packages, Ray, Prefect, the store, GPUs, disk and shared memory.

    Exit code 1 where something is wrong; a warning is none.
    """
    prepare_environment()
    from rlhf_flows.services.doctor import examine

    console, lines = Console(), []
    for line in examine(store=store, address=address):
        lines.append(line)
        if not as_json:
            console.print(f"{line.state:8}", style=_COLOURS[line.state], end="")
            text = f"{line.what}: {line.found}"
            step = f" -> {line.next_step}" if line.next_step else ""
            console.print(text + step, markup=False, highlight=False, soft_wrap=True)
    is_ok = all(line.state != "wrong" for line in lines)
    if as_json:
        print_json({"ok": is_ok, "lines": [asdict(line) for line in lines]})
    if not is_ok:
        raise typer.Exit(1)
