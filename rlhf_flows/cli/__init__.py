"""The command line: `rlhf-flows train RECIPE key=value ...`, and a look at what runs left.

A file for each group of commands, which `--help` lists in this order. What is heavy is imported
inside a command. A wrong input ends with one paragraph on standard error and exit code 2, before
anything expensive starts; any other failure of a run with exit code 1.
"""

from __future__ import annotations

import sys

from rich.console import Console

# In the order of `--help`.
# isort: off
from rlhf_flows.cli import training, sweeps, runs, episodes
from rlhf_flows.cli import pools, deploy, blocks, automations, doctor

# isort: on
from rlhf_flows.cli.application import app
from rlhf_flows.errors import RlhfFlowsError, UserError

__all__ = [
    "app",
    "automations",
    "blocks",
    "deploy",
    "doctor",
    "episodes",
    "main",
    "pools",
    "runs",
    "sweeps",
    "training",
]


def main() -> None:
    """Runs the command line; what goes wrong is one paragraph."""
    # The user's own reward functions and modules are importable from where they stand.
    sys.path.insert(0, "")
    try:
        app()
    except RlhfFlowsError as e:
        Console(stderr=True).print(f"error: {e}", style="red", markup=False, highlight=False)
        sys.exit(2 if isinstance(e, UserError) else 1)
