"""A flow that tests deploy where only its start and its end matter."""

from __future__ import annotations

import time

from prefect import flow


@flow(name="short", persist_result=False)
def short(seconds: float = 0.0, defaults: str | None = None) -> None:
    """Takes its time."""
    time.sleep(seconds)


NOT_A_FLOW = "text"
