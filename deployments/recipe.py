"""What a recipe is: a configuration, and a function from it to an engine.

The command line, a deployment and a user's program all go through the same three steps: load the
configuration, check it, run. A recipe adds nothing that a program of one's own could not do.
"""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from rlhf_flows.config import EngineConfig, StoreConfig
from rlhf_flows.errors import ConfigError
from rlhf_flows.reporting.summary import RecipeResult
from rlhf_flows.tasks.progress import Progress

__all__ = ["RECIPES", "Recipe", "RecipeResult", "find_recipe", "store_words"]


class Run(Protocol):
    def __call__(
        self, config: Any, /, *, progress: Progress | None, takeover: bool
    ) -> Awaitable[RecipeResult]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A named way to train."""

    name: str
    config: type[EngineConfig]
    check: Callable[[Any], None]
    """Raises UserError for what can be known to be wrong before anything starts."""
    run: Run


RECIPES: Mapping[str, str] = {
    "quickstart": "teach a small model to sort digits: warm-up, then GRPO; needs no input",
    "sft": "supervised fine-tuning on a file of prompts and completions",
    "grpo": "reinforcement (GRPO) on a file of prompts with a reward function",
}
"""Names and what they do; each is the module of this package of that name."""


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ConfigError that lists them."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}: there are {', '.join(RECIPES)}")
    recipe = import_module(f"rlhf_flows.deployments.{name}").RECIPE
    assert isinstance(recipe, Recipe)
    return recipe


def store_words(config: EngineConfig, option: str = "--store ") -> str:
    """What a command needs to find the store of a run: nothing, where it is the default."""
    url = config.store.url
    return "" if url == StoreConfig().url else f" {option}{shlex.quote(url)}"
