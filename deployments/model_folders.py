"""Where a model lies: a folder, or what another run of the same store has trained.

The decision here: a stage takes what the one before it trained by that run's name, `run:NAME`, so
that a pipeline needs no export in between. A version should be named where the other run may still
go on, `run:NAME@VERSION`: the newest one is another model tomorrow.
"""

from __future__ import annotations

import re
from pathlib import Path

from rlhf_flows.config import StoreConfig
from rlhf_flows.errors import ConfigError
from rlhf_flows.exports import exported_model

__all__ = ["MODEL", "model_folder"]

MODEL = (
    "A local Hugging Face folder with model and tokenizer; or run:NAME, what another run of this"
    " store has trained: its newest version, or run:NAME@VERSION; run:NAME/MODULE where it trains"
    " several."
)
"""What a field that takes one says of itself."""

_RUN = re.compile(r"run:(?P<run>[^@/]+)(?:@(?P<version>\d+))?(?:/(?P<module>[^@/]+))?")


def model_folder(model: str, store: StoreConfig) -> Path:
    """The folder. What a run trained is fetched first, where the store is not on this machine.

    Raises ConfigError where it is no such name, or the run, the version or the module is not there.
    """
    if not model.startswith("run:"):
        return Path(model)
    found = _RUN.fullmatch(model)
    if found is None:
        raise ConfigError(
            f"model {model!r} does not name what a run trained: write run:NAME, run:NAME@VERSION"
            " or run:NAME@VERSION/MODULE"
        )
    version = found["version"]
    return exported_model(
        store.url,
        found["run"],
        version=None if version is None else int(version),
        module=found["module"] or "",
        retry_budget_s=store.retry_budget_s,
    )
