"""`rlhf-flows train`, and the recipes that it knows."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console

from rlhf_flows.cli.application import app
from rlhf_flows.services.environment import prepare_environment


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A name of `rlhf-flows recipes`, or package.module:name.")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings, as key=value.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A YAML file of settings.")
    ] = None,
    defaults: Annotated[
        str | None, typer.Option(help='Name of a Prefect block "RLHF Run Defaults".')
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            help="RUN@VERSION: a child of that run begins with its weights, and with its settings"
            " where you say no other.",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the summary to this file, too.")
    ] = None,
    takeover: Annotated[
        bool, typer.Option(help="Replace another attempt of this run that is alive.")
    ] = False,
    verbose: Annotated[bool, typer.Option(help="Show the logs of Prefect.")] = False,
) -> None:
    """Trains by a recipe. With the run_name of an earlier run, goes on with it."""
    prepare_environment(verbose=verbose)
    from rlhf_flows.config_loading import load_config
    from rlhf_flows.deployments import find_recipe
    from rlhf_flows.deployments.children import parent_settings

    chosen = find_recipe(recipe)
    of_parent = None
    if init_from is not None:
        of_parent = parent_settings(chosen.config, init_from, settings or (), file=config)
    loaded = load_config(chosen.config, settings or (), file=config, defaults=of_parent)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"{json_file.parent} is no folder", param_hint="--json")
    if json_file is not None and json_file.is_dir():
        raise typer.BadParameter(f"{json_file} is a folder: name a file", param_hint="--json")
    from rlhf_flows.reporting.summary import print_summary, summarize, write_summary
    from rlhf_flows.reporting.terminal import TerminalProgress
    from rlhf_flows.services.environment import flow_run_url
    from rlhf_flows.services.prefect_server import check_configured_server, prefect_api

    console = Console()
    check_configured_server()
    if defaults is not None:
        loaded = _with_defaults(loaded, defaults)
    chosen.check(loaded)
    with prefect_api() as server:
        if server is not None:
            console.print(f"while it runs, its pages are at {server.url}", soft_wrap=True)
        with TerminalProgress(console, num_episode=loaded.runtime.num_episode) as progress:
            try:
                result = asyncio.run(_train(chosen, loaded, server, progress, takeover))
            except KeyboardInterrupt:
                Console(stderr=True).print(
                    "interrupted: start again with the same run_name to resume"
                )
                raise typer.Exit(130) from None
    summary = summarize(
        result,
        total_seconds=time.time() - psutil.Process().create_time(),
        flow_run_url=flow_run_url(result.run.flow_run_id),
    )
    if json_file is not None:
        write_summary(summary, json_file)
    print_summary(console, result, summary)


def _with_defaults(config: Any, name: str) -> Any:
    from rlhf_flows.blocks import apply_defaults
    from rlhf_flows.cli.server import prefect_client

    with prefect_client():  # blocks are kept by a server that stays
        return asyncio.run(apply_defaults(config, name))


async def _train(recipe: Any, config: Any, server: Any, progress: Any, takeover: bool) -> Any:
    from rlhf_flows.pools import connect

    # Two services, each of which takes some seconds to start, and keeps one core busy meanwhile.
    ray = asyncio.create_task(connect(config.cluster))
    if server is not None:
        await asyncio.to_thread(server.wait)
    await ray
    return await recipe.run(config, progress=progress, takeover=takeover)


@app.command()
def recipes(
    module: Annotated[
        str | None, typer.Argument(help="One of yours that registers some.", show_default=False)
    ] = None,
) -> None:
    """Lists what can be trained by name."""
    from rlhf_flows.deployments import known_recipes

    for name, description in known_recipes(module).items():
        Console().print(f"{name:14} {description}", soft_wrap=True, markup=False, highlight=False)
