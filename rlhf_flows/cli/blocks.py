"""`rlhf-flows blocks`: those of this package that a Prefect server has, and whether they work.

The pages of Prefect have no button for it: a block is tried from where its runs would be, by hand.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from rlhf_flows.cli.application import app
from rlhf_flows.cli.server import prefect_client
from rlhf_flows.errors import ConfigError

blocks_app = typer.Typer(help="Blocks on a Prefect server.", no_args_is_help=True)
app.add_typer(blocks_app, name="blocks")

AsJson = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]


@blocks_app.command("ls")
def blocks_ls(as_json: AsJson = False) -> None:
    """Lists the blocks that runs can name."""
    with prefect_client() as client:
        names = [f"{slug}/{name}" for slug, name in _saved(client)]
    if as_json:
        typer.echo(json.dumps(names))
    else:
        Console().print("\n".join(names) or "none: make one in the UI under Blocks")


@blocks_app.command("check")
def blocks_check(
    name: Annotated[str, typer.Argument(help="NAME, or TYPE/NAME as `blocks ls` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Connects to what a block describes, from this machine: a cluster, a store, or both."""
    from prefect.blocks.core import Block

    with prefect_client() as client:
        known = [f"{slug}/{saved}" for slug, saved in _saved(client)]
        found = [full for full in known if name in (full, full.partition("/")[2])]
        if len(found) != 1:
            few = "no block" if not found else "more than one block"
            raise ConfigError(
                f"{few} is called {name!r}: the server has {', '.join(known) or 'none'}"
            )
        block: Any = Block.load(found[0])
    resources = block.check() or {}
    if as_json:
        typer.echo(json.dumps({"block": found[0], "resources": resources}))
        return
    said = ", ".join(
        f"{amount:g} {kind}" for kind, amount in sorted(resources.items()) if ":" not in kind
    )
    Console().print(f"{found[0]} works{f': {said}' if said else ''}", highlight=False, markup=False)


def _saved(client: Any) -> list[tuple[str, str]]:
    """Types and names."""
    from prefect.exceptions import ObjectNotFound

    from rlhf_flows.blocks import EpisodeStore, RayCluster, RunDefaults

    found = []
    for block in (RayCluster, EpisodeStore, RunDefaults):
        slug = block.get_block_type_slug()
        try:
            documents = client.read_block_documents_by_type(slug)
        except ObjectNotFound:  # the type was never registered
            documents = []
        found += [(slug, d.name) for d in documents if d.name]
    return sorted(found)
