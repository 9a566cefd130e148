"""What a team says once of all its runs, as a block: where they compute, where they keep what they
make, where its models lie, and settings that it shares.

The decision here: a run names the block (`defaults`, a parameter of every deployment beside
`config`), and the block is read when the run starts. So it may change without deploying anew, and
its secrets go from the server into the environment of the run's process, never through parameters.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, ClassVar, TypeVar

from prefect.blocks.core import Block
from pydantic import Field, HttpUrl, model_validator

from rlhf_flows.blocks.episode_store import EpisodeStore
from rlhf_flows.blocks.ray_cluster import RayCluster
from rlhf_flows.config import EngineConfig
from rlhf_flows.config_loading import load_config, merge_settings
from rlhf_flows.errors import ConfigError

__all__ = ["RunDefaults", "apply_defaults"]

ConfigT = TypeVar("ConfigT", bound=EngineConfig)


class RunDefaults(Block):
    """
    What runs take where they do not say otherwise: a Ray cluster, a store of episodes, a folder of
    models, and any settings of their recipe.

    Attributes:
        cluster: The Ray cluster.
        store: The episode store.
        model_folder: Where models lie that are named without a folder.
        settings: Further settings of the recipe.

    Example:
        Run a recipe with what the team has agreed on:
        ```python
        from rlhf_flows.blocks import RunDefaults

        defaults = RunDefaults.load("BLOCK_NAME")
        defaults.export_credentials()
        config = defaults.apply(config)
        ```
    """

    _block_type_name: ClassVar[str | None] = "RLHF Run Defaults"
    _block_type_slug: ClassVar[str | None] = "rlhf-run-defaults"
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl("https://github.com/PrefectHQ.png?size=200")
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl(
        "https://docs.prefect.io/v3/concepts/blocks"
    )

    cluster: RayCluster | None = Field(
        default=None, title="Ray cluster", description="Where the models run."
    )
    store: EpisodeStore | None = Field(
        default=None, title="Episode store", description="Where runs keep what they make."
    )
    model_folder: str | None = Field(
        default=None,
        title="Folder of models",
        description="A run's model `base` is then the folder `base` in here; an absolute path and"
        " run:NAME stay what they are.",
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        title="Settings",
        description="Of the recipe, nested as in a YAML file: a run takes them where it leaves its"
        " own at their defaults.",
    )

    @model_validator(mode="after")
    def _said_once(self) -> RunDefaults:
        for name, block in (("cluster", self.cluster), ("store", self.store)):
            if block is not None and name in self.settings:
                raise ValueError(
                    f"settings has {name!r}, and there is a block for it: leave one of them out"
                )
        return self

    def apply(self, config: ConfigT) -> ConfigT:
        """The configuration with what this block says wherever it has its recipe's defaults.

        The form of a deployment sends every field, touched or not, so a setting counts as the
        run's own where it differs from what the recipe has without it.

        Raises:
            ConfigError: a setting that the recipe does not have, or that it refuses.
        """
        merged: dict[str, Any] = {}
        merge_settings(merged, self.settings)
        if self.cluster is not None:
            cluster = self.cluster.to_config().model_dump(exclude_defaults=True)
            merge_settings(merged, {"cluster": cluster})
            merge_settings(merged, {"runtime_env": self.cluster.runtime_env.for_ray()})
        if self.store is not None:
            store = self.store.to_config().model_dump(exclude_defaults=True)
            merge_settings(merged, {"store": store})
        merge_settings(merged, _own(config))
        model = merged.get("model")
        if self.model_folder is not None and isinstance(model, str):
            merged["model"] = _in_folder(model, self.model_folder)
        return load_config(type(config), defaults=merged)

    def export_credentials(self) -> None:
        """Puts those of cluster and store into the environment of this process."""
        for block in (self.cluster, self.store):
            if block is not None:
                block.export_credentials()

    def check(self) -> dict[str, float]:
        """Checks cluster and store; the resources of the cluster, none where no block names one.

        Raises:
            ConfigError: the folder of models is not there.
            PoolError: of the cluster's check.
            StoreError: of the store's.
        """
        if self.model_folder is not None and not os.path.isdir(self.model_folder):
            raise ConfigError(
                f"model_folder is {self.model_folder!r}, and there is no such folder on this"
                " machine: it must be there wherever flows and trainers run"
            )
        if self.store is not None:
            self.store.check()
        return {} if self.cluster is None else self.cluster.check()


async def apply_defaults(config: ConfigT, name: str | None) -> ConfigT:
    """`config` over the block of that name, whose credentials this process then has.

    Raises ConfigError where there is no such block, or it does not fit the recipe.
    """
    if not name:
        return config
    try:
        loaded: Any = await RunDefaults.aload(
            name.removeprefix(f"{RunDefaults.get_block_type_slug()}/")
        )
    except ValueError as e:
        raise ConfigError(
            f"defaults={name!r}: the Prefect server has no block 'RLHF Run Defaults' of this name;"
            " `rlhf-flows blocks ls` lists those that it has"
        ) from e
    block: RunDefaults = loaded
    block.export_credentials()
    return block.apply(config)


def _own(config: EngineConfig) -> dict[str, Any]:
    """What the run asks for itself: what was given, and differs from the recipe without it."""
    given = config.model_dump(exclude_unset=True)
    fields = type(config).model_fields
    required = {n: v for n, v in given.items() if n in fields and fields[n].is_required()}
    usual = load_config(type(config), defaults=required).model_dump()
    return {**_differing(given, usual), **required}


def _differing(given: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in usual and value == usual[name]:
            continue
        there = usual.get(name)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            if inner := _differing(value, there):
                found[name] = inner
        else:
            found[name] = value
    return found


def _in_folder(model: str, folder: str) -> str:
    if model.startswith("run:") or PurePath(model).is_absolute():
        return model
    return str(PurePath(folder) / model)
