"""The command line: `rlhf-flows train RECIPE key=value ...`, and a look at what runs left.

A wrong input ends with one paragraph on standard error and exit code 2, before anything expensive
starts; any other failure of a run with exit code 1.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console

from rlhf_flows.errors import RlhfFlowsError, UserError
from rlhf_flows.services.delays import Delays
from rlhf_flows.services.environment import prepare_environment

__all__ = ["app", "main"]

app = typer.Typer(
    name="rlhf-flows",
    help="RLHF and RL post-training of language models as Prefect flows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
pools_app = typer.Typer(help="Actor pools on a Ray cluster.", no_args_is_help=True)
app.add_typer(pools_app, name="pools")
automations_app = typer.Typer(
    help="Automations on a Prefect server that start crashed runs again.", no_args_is_help=True
)
app.add_typer(automations_app, name="automations")
_DELAYS = Delays()


def main() -> None:
    """Runs the command line; what goes wrong is one paragraph."""
    # The user's own reward functions and modules are importable from where they stand.
    sys.path.insert(0, "")
    try:
        app()
    except RlhfFlowsError as e:
        Console(stderr=True).print(f"error: {e}", style="red", markup=False, highlight=False)
        sys.exit(2 if isinstance(e, UserError) else 1)


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

    chosen = find_recipe(recipe)
    loaded = load_config(chosen.config, settings or (), file=config)
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


@app.command()
def ls(store: Annotated[str, typer.Option(help="Store of the runs.")] = "runs") -> None:
    """Lists the runs of a store."""
    from rlhf_flows.reporting.inspection import list_runs

    console = Console()
    console.print(list_runs(store))


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="Name of the run.")],
    store: Annotated[str, typer.Option(help="Store of the run.")] = "runs",
    samples: Annotated[int, typer.Option(help="Samples of the last episode to show.")] = 4,
) -> None:
    """Shows what a run has come to: its episodes, evaluations and some samples."""
    from rlhf_flows.reporting.inspection import show_run

    console = Console()
    for part in show_run(store, run, samples=samples):
        console.print(part)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Name of the run.")],
    to: Annotated[Path, typer.Option("--to", help="An empty or new folder.")],
    version: Annotated[int | None, typer.Option(help="Policy version; the newest if none.")] = None,
    module: Annotated[str, typer.Option(help="Which trained module.")] = "",
    store: Annotated[str, typer.Option(help="Store of the run.")] = "runs",
) -> None:
    """Writes a trained model as a Hugging Face folder."""
    from rlhf_flows.exports import export_model

    folder = export_model(store, run, to, version=version, module=module)
    Console().print(f"the model of {run} is in {folder}", soft_wrap=True)


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


@automations_app.command("install")
def automations_install(
    restart_s: Annotated[
        float, typer.Option(help="Seconds from a crash to the restart.", min=15)
    ] = _DELAYS.restart_s,
    heartbeat_s: Annotated[
        float, typer.Option(help="Seconds without a heartbeat that are a crash.", min=60)
    ] = _DELAYS.heartbeat_s,
    crashes_per_hour: Annotated[
        int, typer.Option(help="Crashes of one flow run that end the restarts.", min=2)
    ] = _DELAYS.crashes_per_hour,
) -> None:
    """Installs them on the server of PREFECT_API_URL, or replaces them there."""
    from rlhf_flows.services.automations import TAG, install

    delays = Delays(restart_s=restart_s, heartbeat_s=heartbeat_s, crashes_per_hour=crashes_per_hour)
    with _prefect_client() as client:
        for name in install(client, delays):
            Console().print(f"installed {name!r}, for flow runs with the tag {TAG!r}")


@automations_app.command("remove")
def automations_remove() -> None:
    """Removes them from the server."""
    from rlhf_flows.services.automations import remove

    with _prefect_client() as client:
        names = remove(client)
    Console().print("\n".join(f"removed {name!r}" for name in names) or "there were none")


@automations_app.command("ls")
def automations_ls() -> None:
    """Lists those that the server has."""
    from rlhf_flows.services.automations import installed

    with _prefect_client() as client:
        found = installed(client)
    for automation in found:
        is_on = "on" if automation.enabled else "off"
        Console().print(f"{automation.name} ({is_on}): {automation.description}", soft_wrap=True)
    if not found:
        Console().print("none: `rlhf-flows automations install` makes them")


@contextmanager
def _prefect_client() -> Iterator[Any]:
    """A client of the server that is configured. Raises ConfigError where none is, or it fails."""
    import httpx
    from prefect.client.orchestration import get_client

    from rlhf_flows.errors import ConfigError
    from rlhf_flows.services.environment import is_server_configured
    from rlhf_flows.services.prefect_server import check_configured_server

    if not is_server_configured():
        raise ConfigError(
            "no Prefect server is configured: automations live on one that stays, so start it with"
            " `prefect server start` and set PREFECT_API_URL, such as http://127.0.0.1:4200/api"
        )
    check_configured_server()
    with get_client(sync_client=True) as client:
        try:
            yield client
        except httpx.HTTPStatusError as e:
            raise ConfigError(
                f"the Prefect server at {client.api_url} refuses: {e}. Check PREFECT_API_URL, and"
                " PREFECT_API_KEY or PREFECT_API_AUTH_STRING where it asks for one"
            ) from e


if __name__ == "__main__":
    main()
