"""`rlhf-flows pools`: the actors of all runs on a cluster."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from rlhf_flows.cli.application import app

pools_app = typer.Typer(help="Actor pools on a Ray cluster.", no_args_is_help=True)
app.add_typer(pools_app, name="pools")


@pools_app.command("ls")
def pools_ls(address: Annotated[str, typer.Option(help="host:port of the Ray head.")]) -> None:
    """Lists the actors of all runs on a cluster."""
    from rlhf_flows.reporting.inspection import list_pools

    Console().print(list_pools(address))


@pools_app.command("release")
def pools_release(
    run: Annotated[str, typer.Argument(help="Name of the run.")],
    address: Annotated[str, typer.Option(help="host:port of the Ray head.")],
) -> None:
    """Ends the actors of a run, and frees what they hold."""
    from rlhf_flows.reporting.inspection import release_pools

    count = release_pools(address, run)
    Console().print(f"{count} actors of {run} were ended")
