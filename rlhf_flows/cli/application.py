"""The application that the commands of this room add themselves to."""

from __future__ import annotations

import typer

__all__ = ["app"]

app = typer.Typer(
    name="rlhf-flows",
    help="RLHF and RL post-training of language models as Prefect flows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
