"""A look at the runs of a store, and what is taken from there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rlhf_flows.cli.answers import AsJson, RunName, StoreUrl, print_json, print_table
from rlhf_flows.cli.application import app


@app.command()
def runs(store: StoreUrl = "runs", as_json: AsJson = False) -> None:
    """Lists the runs of a store: how far, how the last attempt ended, whose weights they began
    from.
    """
    from rlhf_flows.records.finding import open_existing_store
    from rlhf_flows.records.summaries import summarize_runs

    opened = open_existing_store(store)
    found = summarize_runs(opened)
    if as_json:
        print_json({"store": opened.url, "runs": [asdict(run) for run in found]})
        return
    rows = [
        {
            "run": run.run,
            "started": run.created_at,
            "episodes": f"{run.episodes} of {run.num_episode}",
            "attempts": run.attempts,
            "the last one": run.outcome or "not ended",
            "from": run.parent,
        }
        for run in found
    ]
    columns = ["run", "started", "episodes", "attempts", "the last one"]
    columns += ["from"] if any(run.parent for run in found) else []
    print_table(rows, columns, title=f"runs in {opened.url}")


# What it was called first.
app.command("ls", hidden=True)(runs)


@app.command()
def show(
    run: RunName,
    store: StoreUrl = "runs",
    samples: Annotated[int, typer.Option(help="Samples of the last episode to show.")] = 4,
) -> None:
    """Shows what a run has come to: its episodes, evaluations and some samples."""
    from rlhf_flows.reporting.inspection import show_run

    console = Console()
    for part in show_run(store, run, samples=samples):
        console.print(part)


@app.command()
def export(
    run: RunName,
    to: Annotated[Path, typer.Option("--to", help="An empty or new folder.")],
    version: Annotated[int | None, typer.Option(help="Policy version; the newest if none.")] = None,
    module: Annotated[str, typer.Option(help="Which trained module.")] = "",
    episode: Annotated[
        int | None, typer.Option(help="The samples of this episode, instead of a model.")
    ] = None,
    store: StoreUrl = "runs",
    as_json: AsJson = False,
) -> None:
    """Writes a trained model as a Hugging Face folder, or the samples of an episode as Parquet."""
    if episode is not None and (version is not None or module):
        raise typer.BadParameter(
            "--version and --module choose a model, --episode samples: give one or the other"
        )
    if episode is not None:
        from rlhf_flows.records.episode_files import export_episode

        written, what = export_episode(store, run, to, episode=episode), f"episode {episode}"
    else:
        from rlhf_flows.exports import export_model

        written, what = export_model(store, run, to, version=version, module=module), "the model"
    if as_json:
        print_json({"run": run, "episode": episode, "version": version, "path": str(written)})
    else:
        Console().print(f"{what} of {run} is in {written}", soft_wrap=True, markup=False)
