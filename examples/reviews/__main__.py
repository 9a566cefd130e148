"""The whole pipeline on two CPU cores: SFT, then a reward model and PPO, or DPO.

    python -m examples.reviews                 # all of it: data, stages, a table and curves
    python -m examples.reviews --only-data     # the files alone, for `rlhf-flows train`
    python -m examples.reviews sft dpo         # some of the stages

Each stage is `rlhf-flows train RECIPE -c examples/reviews/RECIPE.yaml`, a run of its own name, and
takes what the one before it trained. Killed and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from examples.reviews.data import make

HERE = Path(__file__).parent
STAGES = ("sft", "reward_model", "ppo", "dpo", "online_dpo", "grpo")
TRAINED = {
    "sft": "run:reviews-sft",
    "ppo": "run:reviews-ppo/ppo_policy",
    "dpo": "run:reviews-dpo",
    "online_dpo": "run:reviews-online-dpo",
    "grpo": "run:reviews-grpo",
}
"""What each stage leaves that writes reviews."""


def train(recipe: str, *words: str, summary: Path) -> dict[str, Any]:
    """One stage, as the command line runs it; its summary."""
    command = ["rlhf-flows", "train", recipe, "-c", str(HERE / f"{recipe}.yaml"), *words]
    print(f"\n$ {' '.join(command)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_flows.cli", *command[1:], "--json", str(summary)], check=False
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    found: dict[str, Any] = yaml.safe_load(summary.read_text("utf-8"))
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description="SFT, reward model, PPO and DPO on film reviews.")
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; all by default")
    parser.add_argument("--only-data", action="store_true", help="make the files and stop")
    words = parser.parse_args(arguments)
    if unknown := sorted(set(words.stages) - set(STAGES)):
        parser.error(f"there is no stage {unknown[0]!r}: there are {', '.join(STAGES)}")
    folder = make(Path("reviews"))
    if words.only_data:
        print(f"the files are in {folder}")
        return {}
    stages = [stage for stage in STAGES if not words.stages or stage in words.stages]
    summaries = {s: train(s, summary=folder / f"{s}.json") for s in stages}
    judged = {
        stage: train(
            "generate", f"model={TRAINED[stage]}", f"run_name=reviews-judged-{stage}",
            summary=folder / f"judged-{stage}.json",
        )["metrics"]["after"]
        for stage in stages if stage in TRAINED
    }  # fmt: skip
    table = Table(title="what a reader thinks of 256 held-out films' reviews")
    for name in ("after", "opinion, -1 to 1", "are reviews", "seconds of its training"):
        table.add_column(name)
    for stage, found in judged.items():
        seconds = summaries[stage]["seconds"]["total"]
        table.add_row(
            stage, f"{found['reward']:.2f}", f"{found['is_review']:.0%}", f"{seconds:.0f}"
        )
    Console().print(table)
    print(f"the curves are in {plot(summaries, folder / 'reviews.png')}")
    return judged


CURVES = {
    "sft": ("loss", "loss of demonstrations"),
    "reward_model": ("accuracy", "accuracy on pairs"),
    "ppo": ("reward", "learnt reward"),
    "dpo": ("accuracy", "accuracy on pairs"),
    "online_dpo": ("reward", "learnt reward"),
    "grpo": ("reward", "the reader's opinion"),
}


def plot(summaries: dict[str, dict[str, Any]], file: Path) -> Path:
    """What each stage measured while it trained, by episode, as a PNG."""
    from matplotlib.figure import Figure

    columns = min(3, len(summaries))
    rows = -(-len(summaries) // columns)
    figure = Figure(figsize=(3.7 * columns, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for (stage, summary), ax in zip(summaries.items(), axes, strict=False):
        name, title = CURVES[stage]
        values = [_of(row, name) for row in summary["episodes"]]
        ax.plot(range(1, len(values) + 1), values, marker="o")
        ax.set_title(f"{stage}: {title}", fontsize=10)
        ax.set_xlabel("episode")
        ax.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    return file


def _of(row: dict[str, Any], name: str) -> float:
    """A metric of an episode, whichever of the trained modules it is of."""
    found = next(value for key, value in row.items() if key.rpartition("/")[2] == name)
    return float(found)


if __name__ == "__main__":
    main()
