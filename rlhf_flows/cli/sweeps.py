"""`rlhf-flows sweep` and `sweep-table`: a recipe over a grid of settings, and what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rlhf_flows.cli.application import app
from rlhf_flows.cli.server import prefect_client
from rlhf_flows.services.environment import prepare_environment

_Store = Annotated[str, typer.Option(help="Store of the sweep.")]
_Json = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
_By = Annotated[
    str | None, typer.Option(help="Metric that says which is best; the reward if there is one.")
]
_Lowest = Annotated[
    bool | None, typer.Option("--lowest/--highest", help="Which value of it is best.")
]


@app.command()
def sweep(
    recipe: Annotated[
        str, typer.Argument(help="A name of `rlhf-flows recipes`, or package.module:name.")
    ],
    settings: Annotated[
        list[str], typer.Argument(help="Settings: key=value, and key=a,b,c for the grid.")
    ],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A YAML file of settings.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Of the sweep; its runs are NAME-001 and so on. By default from the grid."
        ),
    ] = None,
    parallel: Annotated[int, typer.Option(help="Runs at the same time, here.", min=1)] = 1,
    submit: Annotated[
        bool, typer.Option("--submit", help="Make flow runs of the deployment, and return.")
    ] = False,
    queue: Annotated[
        str | None, typer.Option(help="With --submit: the work queue, such as high or low.")
    ] = None,
    deployment: Annotated[
        str | None, typer.Option(help="With --submit: FLOW/NAME, if not that of the recipe.")
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Start nothing, show what there is.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Runs a recipe over a grid of settings. The same command goes on with what is missing."""
    prepare_environment()
    from rlhf_flows.attempt import open_probed_store
    from rlhf_flows.deployments import find_recipe
    from rlhf_flows.deployments.sweep import deployment_of, is_complete, plan_sweep, remember

    if not submit and (queue is not None or deployment is not None):
        raise typer.BadParameter("they go with --submit", param_hint="--queue, --deployment")
    chosen = find_recipe(recipe)
    planned = plan_sweep(chosen, settings, file=config, name=name)
    first = planned.points[0].config
    if table:
        _show(first.store.url, planned.name, as_json=as_json)
        return
    console = Console(stderr=as_json)
    store = open_probed_store(first)
    todo = [
        point
        for point in planned.points
        if not is_complete(store, point.run, num_episode=point.config.runtime.num_episode)
    ]
    for point in todo:
        # Without its name: a name is claimed for good, and a point further on may be wrong.
        chosen.check(point.config.model_copy(update={"run_name": None}))
    remember(store, planned)
    there = len(planned.points) - len(todo)
    console.print(
        f"sweep {planned.name}: {len(planned.points)} runs, {there} of them done", soft_wrap=True
    )
    failed: list[str] = []
    if submit:
        _submit(console, deployment or deployment_of(chosen.name), todo, planned.name, queue)
    elif todo:
        from rlhf_flows.deployments.sweep_runs import run_here

        try:
            failed = run_here(
                recipe, todo, file=config, parallel=parallel, say=lambda s: _say(console, s)
            )
        except KeyboardInterrupt:
            said = "interrupted: the same command goes on with what is missing"
            _say(Console(stderr=True), said)
            raise typer.Exit(130) from None
    if not submit:
        _show(first.store.url, planned.name, as_json=as_json)
    if failed:
        _say(
            Console(stderr=True), f"failed: {', '.join(failed)}; the same command tries them again"
        )
        raise typer.Exit(1)


@app.command("sweep-table")
def sweep_table(
    name: Annotated[str, typer.Argument(help="Name of the sweep.")],
    store: _Store = "runs",
    by: _By = None,
    lowest: _Lowest = None,
    as_json: _Json = False,
) -> None:
    """Shows the runs of a sweep with their settings and what they came to, the best one first."""
    _show(store, name, by=by, lowest=lowest, as_json=as_json)


def _show(
    url: str,
    name: str,
    *,
    by: str | None = None,
    lowest: bool | None = None,
    as_json: bool = False,
) -> None:
    from rlhf_flows.deployments.sweep_table import draw_table, sweep_rows
    from rlhf_flows.store import open_store

    rows = sweep_rows(open_store(url), name, by=by, lowest=lowest)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        Console().print(draw_table(name, rows))


def _submit(
    console: Console, deployment: str, todo: list[Any], name: str, queue: str | None
) -> None:
    from rlhf_flows.deployments.sweep_runs import submit

    with prefect_client() as client:
        made = submit(client, deployment, todo, sweep=name, queue=queue)
    for run, flow_run_id in made.items():
        _say(console, f"{run}: flow run {flow_run_id}")
    if waiting := len(todo) - len(made):
        _say(console, f"{waiting} are under way already")
    _say(console, f"tagged sweep:{name}; then `rlhf-flows sweep-table {name}`")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
