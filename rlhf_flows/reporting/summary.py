"""What a run came to: a page for people, the same as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf_flows.flow import RunResult
from rlhf_flows.services.environment import is_server_configured

__all__ = ["RecipeResult", "print_summary", "summarize", "write_summary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeResult:
    """What a recipe did: its last run, and what to say of it."""

    recipe: str
    run: RunResult
    sampler: str = ""
    """What sampled, with its version."""
    objective: str = "reward"
    """The metric of the evaluations that says how good the policy is."""
    seconds: Mapping[str, float]
    """By phase, over all runs of the recipe."""
    next_steps: Sequence[str] = ()
    """Commands to try."""


def summarize(result: RecipeResult, *, total_seconds: float, flow_run_url: str) -> dict[str, Any]:
    """The summary as plain data; keys are stable."""
    run = result.run
    versions = sorted(run.evaluations)
    return {
        "recipe": result.recipe,
        "run": run.run,
        "url": run.url,
        "flow_run_url": flow_run_url,
        "sampler": result.sampler,
        "objective": result.objective,
        "version": run.version,
        "resumed_at": run.resumed_at,
        "metrics": {
            "before": dict(run.evaluations[versions[0]]) if versions else {},
            "after": dict(run.evaluations[versions[-1]]) if versions else {},
        },
        "left_out": list(run.left_out),
        "evaluations": {str(v): dict(run.evaluations[v]) for v in versions},
        "episodes": [dict(run.episodes[e]) for e in sorted(run.episodes)],
        "seconds": {**{k: round(v, 3) for k, v in result.seconds.items()},
                    "total": round(total_seconds, 3)},
    }  # fmt: skip


def write_summary(summary: Mapping[str, Any], file: Path) -> None:
    file.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def print_summary(console: Console, result: RecipeResult, summary: Mapping[str, Any]) -> None:
    """What improved, where the run lies, what to try next."""
    objective = result.objective
    before, after = summary["metrics"]["before"], summary["metrics"]["after"]
    console.print()
    if objective in after and len(summary["evaluations"]) == 1:
        console.print(f"[bold]{objective}: {after[objective]:.2f}[/]   (version {_only(summary)})")
    elif objective in before and objective in after:
        first = min(result.run.evaluations)
        console.print(
            f"[bold]{objective} on held-out prompts: {before[objective]:.2f} → "
            f"{after[objective]:.2f}[/]   (version {first} → {summary['version']})"
        )
    if result.run.left_out:
        deleted = ", ".join(map(str, result.run.left_out))
        console.print(f"not evaluated, as retention deleted their weights: versions {deleted}")
    curve = _curve(result)
    if len(curve) > 1:
        console.print(_plot(curve, "training reward by episode"), markup=False, highlight=False)
    seconds = summary["seconds"]
    parts = ", ".join(f"{name.replace('_', ' ')} {s:.1f}" for name, s in seconds.items())
    console.print(f"seconds: {parts}")
    if summary["sampler"]:
        console.print(f"sampled with {summary['sampler']}")
    console.print(f"the run: {summary['url']}", soft_wrap=True)
    if summary["flow_run_url"]:
        note = "" if is_server_configured() else "   (once `prefect server start` runs)"
        console.print(f"its page: {summary['flow_run_url']}{note}", soft_wrap=True)
    if result.next_steps:
        console.print("\nnext:")
        for command in result.next_steps:
            console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def _only(summary: Mapping[str, Any]) -> str:
    return str(next(iter(summary["evaluations"])))


def _curve(result: RecipeResult) -> list[float]:
    name = "reward" if result.objective != "loss" else "loss"
    rows = [result.run.episodes[e] for e in sorted(result.run.episodes)]
    return [float(row[name]) for row in rows if name in row]


def _plot(values: list[float], title: str) -> str:
    import plotext

    figure = plotext.figure
    figure.clear()
    figure.plot_size(64, 12)
    figure.title(title)
    figure.draw(figure.signal(values).lines())
    return str(plotext.uncolorize(str(figure.build())))
