"""What a recipe is: a configuration, and a function from it to an engine.

The command line, a deployment and a user's program all go through the same three steps: load the
configuration, check it, run. A recipe adds nothing that a program of one's own could not do, and
one's own is started like ours once it is registered.
"""

from __future__ import annotations

import asyncio
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any, Self, cast

import prefect
from pydantic import create_model, model_validator

from rlhf_flows.blocks import apply_defaults
from rlhf_flows.config import EngineConfig, StoreConfig
from rlhf_flows.config_loading import merge_settings
from rlhf_flows.engine import Engine
from rlhf_flows.errors import ConfigError
from rlhf_flows.flow import RunResult
from rlhf_flows.models.samplers import describe_sampler, policy_class
from rlhf_flows.registry import Registry, load_module, nearest
from rlhf_flows.reporting.summary import RecipeResult
from rlhf_flows.tasks.progress import Progress

__all__ = [
    "DEFAULTS_DOC",
    "OWN",
    "EngineRecipe",
    "Recipe",
    "RecipeResult",
    "find_recipe",
    "known_recipes",
    "register_recipe",
    "store_words",
]

OWN: Mapping[str, str] = {
    "quickstart": "teach a small model to sort digits: warm-up, then GRPO; needs no input",
    "sft": "supervised fine-tuning on a file of prompts and answers",
    "reward_model": "a reward model, learnt from a file of preferences",
    "ppo": "reinforcement by PPO, with a reward model or any other reward",
    "grpo": "reinforcement by GRPO, with a reward function or any other reward",
    "dpo": "preferences without a reward model (DPO, IPO)",
    "online_dpo": "DPO on pairs that the policy samples and a reward ranks",
    "evaluate": "old versions of a run, or a model, on held-out prompts",
    "generate": "completions of a file of prompts, scored where a reward is given",
}
"""Names and what they do; each is the module of this package of that name."""
DEFAULTS_DOC = """Args:
    defaults: Name of a block "RLHF Run Defaults": what the configuration leaves at its defaults is
        taken from there.
"""
"""What the form of a deployment says of the parameter beside `config`."""


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """A named way to train: `rlhf-flows train NAME key=value …`."""

    name: str
    description: str
    config: type[EngineConfig]

    @abstractmethod
    def check(self, config: Any) -> None:
        """Raises UserError for what can be known to be wrong before anything starts."""

    @abstractmethod
    async def run(
        self, config: Any, /, *, progress: Progress | None = None, takeover: bool = False
    ) -> RecipeResult:
        """All of it, or what is missing of it."""

    def derived(self, name: str, description: str = "", **defaults: Any) -> Self:
        """The same under another name, with other defaults: `reward={"interface": "mine"}`.

        `defaults` are settings under those of the user, in the nested form of a YAML file. Raises
        ConfigError for one that this recipe does not have.
        """
        for setting in defaults:
            if setting not in self.config.model_fields:
                near = nearest(setting, list(self.config.model_fields))
                raise ConfigError(f"recipe {self.name!r} has no setting {setting!r}{near}")
        return replace(
            self,
            name=name,
            description=description or f"{self.name} with other defaults",
            config=_with_defaults(self.config, defaults, name),
        )

    def flow(self) -> Any:
        """The Prefect flow that a deployment runs; its form has the fields of the configuration.

        It stands in the module of the recipe, under a name that the deployment's entrypoint names.
        """

        async def train(config: Any, defaults: str | None = None) -> None:
            await self.run(await apply_defaults(config, defaults))

        # What Prefect makes the form from.
        description = f"{self.description[0].upper()}{self.description[1:]}."
        train.__doc__ = f"{description}\n\n{DEFAULTS_DOC}"
        train.__annotations__ = {
            "config": self.config,
            "defaults": str | None,
            "return": None,
        }
        made = prefect.flow(name=self.name, description=description, persist_result=False)
        return made(train)


def _with_defaults(
    config: type[EngineConfig], defaults: Mapping[str, Any], name: str
) -> type[EngineConfig]:
    """The configuration with other defaults, in programs, files and forms."""
    show_more: Any = config.model_config["json_schema_extra"]

    def show(schema: dict[str, Any], model: type[EngineConfig]) -> None:
        show_more(schema, model)
        for name, value in defaults.items():
            schema["properties"][name]["default"] = value
        schema["required"] = [n for n in schema.get("required", ()) if n not in defaults]

    def under(cls: Any, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        merged: dict[str, Any] = deepcopy(dict(defaults))
        merge_settings(merged, given)
        return merged

    validator: Any = model_validator(mode="before")(cast("Any", classmethod(under)))
    made: type[EngineConfig] = create_model(
        config.__name__,
        __base__=config,
        __doc__=config.__doc__,
        # A name of its own: of one that is derived again, both are asked, the newer one first.
        __validators__={f"_under_{name}": validator},
    )
    made.model_config = {**made.model_config, "json_schema_extra": show}
    made.model_rebuild(force=True)
    return made


@dataclass(frozen=True, kw_only=True)
class EngineRecipe(Recipe):
    """A recipe of one run: a function from its configuration to an engine."""

    build: Callable[[Any], Engine]
    """Raises UserError."""
    ask: Callable[[Any], None] | None = None
    """Further checks before anything starts, such as asking a reward once. Raises UserError."""
    objective: str = "reward"
    """The metric that says how good the model is."""
    finish: Callable[[Any, RunResult], None] | None = None
    """What is left to do when the run has ended, such as writing a file of its results."""
    next_steps: Callable[[Any, RunResult], Sequence[str]] = lambda config, result: ()
    """Commands to try after it, beside looking at the run."""

    def engine(self, config: Any) -> Engine:
        """What `build` makes of it, the user's own modules imported. Raises UserError."""
        for module in config.imports:
            load_module(module, asked_by=f"the module {module!r} of `imports`")
        return self.build(config)

    def check(self, config: Any) -> None:
        self.engine(config).check()
        if self.ask is not None:
            self.ask(config)

    async def run(
        self, config: Any, /, *, progress: Progress | None = None, takeover: bool = False
    ) -> RecipeResult:
        result = await self.engine(config).alearn(progress=progress, takeover=takeover)
        if self.finish is not None:
            await asyncio.to_thread(self.finish, config, result)
        sampler = getattr(config, "sampler", None)
        show = f"rlhf-flows show {result.run}{store_words(config)}"
        return RecipeResult(
            recipe=self.name,
            run=result,
            sampler="" if sampler is None else describe_sampler(policy_class(sampler)),
            objective=self.objective,
            seconds=result.seconds,
            next_steps=(show, *self.next_steps(config, result)),
        )


_RECIPES: Registry[Recipe] = Registry(
    "recipe", {name: f"rlhf_flows.deployments.{name}:RECIPE" for name in OWN}
)


def register_recipe(recipe: Recipe) -> Recipe:
    """Makes it known to `find_recipe`, in this process, by its name."""
    return _RECIPES.register(recipe.name, recipe)


def find_recipe(name: str) -> Recipe:
    """By its name, or by `package.module:name`: a recipe there, or one that is registered when the
    module is imported. Installed packages may name some: entry points of "rlhf_flows.recipes".

    Raises ConfigError with the nearest name.
    """
    if name not in _RECIPES.names():
        name = _installed().get(name, name)
    module, colon, last = name.partition(":")
    if module and colon:
        load_module(module, asked_by=f"recipe {name!r}")
        name = last if last in _RECIPES.names() else name
    recipe = _RECIPES.find(name)
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            f"recipe {name!r} is a {type(recipe).__name__}, expected a Recipe: such as"
            ' find_recipe("ppo").derived("my-ppo", …)'
        )
    return recipe


def known_recipes(module: str | None = None) -> dict[str, str]:
    """Names and descriptions: ours, and what `module` registers when it is imported."""
    if module is not None:
        load_module(module, asked_by="the module of recipes")
    others = {*_RECIPES.names(), *_installed()} - OWN.keys()
    return {**OWN, **{name: find_recipe(name).description for name in sorted(others)}}


def _installed() -> dict[str, str]:
    """Recipes of installed packages: their names, and where they are."""
    return {point.name: point.value for point in entry_points(group="rlhf_flows.recipes")}


def store_words(config: EngineConfig, option: str = "--store ") -> str:
    """What a command needs to find the store of a run: nothing, where it is the default."""
    url = config.store.url
    return "" if url == StoreConfig().url else f" {option}{shlex.quote(url)}"
