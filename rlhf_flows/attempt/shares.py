"""How many processes each module gets, and what each of them reserves.

ChatLearn's rules, where numbers of replicas and ranks are not said: a module has as many processes
as its GPUs (or CPUs) hold; a trained one is one replica with all of them as data-parallel ranks;
any other is as many replicas as its parallel sizes leave.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from rlhf_flows.config import EngineConfig, ModelConfig
from rlhf_flows.errors import ConfigError
from rlhf_flows.modules.base import BaseModule

__all__ = ["Share", "shares_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one module gets."""

    num_replica: int
    ranks_per_replica: int
    gpu_per_process: float
    cpu_per_process: float
    memory_per_process: int

    @property
    def num_processes(self) -> int:
        return self.num_replica * self.ranks_per_replica


def shares_of(
    config: EngineConfig, modules: Mapping[str, BaseModule], *, trained: Collection[str]
) -> Mapping[str, Share]:
    """The share of each module. Raises ConfigError where the numbers do not agree."""
    groups = {name: group for group in config.runtime.colocation for name in group}
    for name in groups:
        if name not in modules:
            raise ConfigError(
                f"runtime.colocation names {name!r}, which no flow calls: the engine's modules are"
                f" {', '.join(sorted(modules))}"
            )
    return {
        name: _share(
            name,
            _with_sizes(f"models.{name}", config.for_model(name), module.parallel_sizes()),
            is_trained=name in trained,
            sharers=len(groups.get(name, (name,))),
        )
        for name, module in modules.items()
    }


def _with_sizes(where: str, model: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig:
    """The section with what its module says of itself. Raises ConfigError where they differ."""
    found = dict(sizes)
    copies = found.pop("data_parallel_size", None)
    for name, size in found.items():
        said = getattr(model, name)
        if name in model.model_fields_set and said != size:
            raise ConfigError(
                f"{where}.{name}={said}, but the module was made with {size}: say it in one place"
            )
    model = model.model_copy(update=found)
    if copies is None:
        return model
    ranks = copies * _model_ranks(model)
    if model.ranks_per_replica not in (None, ranks):
        raise ConfigError(
            f"{where}.ranks_per_replica={model.ranks_per_replica}, but the module was made for"
            f" {ranks} ranks (data_parallel {copies}): say it in one place"
        )
    return model.model_copy(update={"ranks_per_replica": ranks})


def _model_ranks(model: ModelConfig) -> int:
    """Ranks of one whole model."""
    return (
        model.tensor_model_parallel_size
        * model.pipeline_model_parallel_size
        * model.expert_model_parallel_size
    )


def _share(name: str, model: ModelConfig, *, is_trained: bool, sharers: int) -> Share:
    where = f"models.{name}"
    if model.trainable is not None and model.trainable != is_trained:
        raise ConfigError(
            f"{where}.trainable is {str(model.trainable).lower()}, but the trainer's flow"
            f" {'trains' if is_trained else 'does not train'} it: leave the setting out, or change"
            " the flow"
        )
    parallel = _model_ranks(model)
    replicas, ranks = model.num_replica, model.ranks_per_replica
    if is_trained and replicas is not None and replicas > 1:
        raise ConfigError(
            f"{where}.num_replica is {replicas}, but it is trained: a trained module has one"
            " replica, with data-parallel ranks inside (ranks_per_replica)"
        )
    if is_trained:
        replicas = 1
    if ranks is not None and ranks % parallel:
        raise ConfigError(
            f"{where}.ranks_per_replica={ranks} is not a multiple of its parallel sizes'"
            f" product, {parallel}: change it to a multiple of {parallel}, or the sizes"
        )
    processes = _processes(where, model, replicas, ranks)
    if ranks is None:
        ranks = processes if is_trained else parallel
        if ranks % parallel:
            raise ConfigError(
                f"{where} has {ranks} processes, which its parallel sizes' product {parallel} does"
                " not divide: change num_gpu or the sizes"
            )
    if replicas is None:
        if processes % ranks:
            raise ConfigError(
                f"{where} has {processes} processes and replicas of {ranks}: change num_gpu to a"
                f" multiple of {ranks}"
            )
        replicas = processes // ranks
    # What is reserved is what was asked for in all, however many processes were asked for.
    gpu = model.gpu_per_process or (model.num_gpu / (replicas * ranks))
    cpu = model.cpu_per_process or (model.num_cpu / (replicas * ranks))
    return Share(
        num_replica=replicas,
        ranks_per_replica=ranks,
        gpu_per_process=(gpu if model.num_gpu else 0.0) / sharers,
        cpu_per_process=cpu if model.num_cpu else 0.0,
        memory_per_process=model.memory_bytes,
    )


def _processes(where: str, model: ModelConfig, replicas: int | None, ranks: int | None) -> int:
    """Processes of the module: as many as are said, else as its GPUs hold, else its CPUs."""
    said = None if replicas is None or ranks is None else replicas * ranks
    if said is not None:
        return said
    for kind, total, each in (
        ("gpu", model.num_gpu, model.gpu_per_process),
        ("cpu", model.num_cpu, model.cpu_per_process),
    ):
        if not total:
            continue
        one = each or min(1.0, total)
        count = total / one
        if abs(count - round(count)) > 1e-9:
            raise ConfigError(
                f"{where}.num_{kind}={total:g} is not a multiple of"
                f" {where}.{kind}_per_process={one:g}: change num_{kind} to a multiple, or leave"
                f" {kind}_per_process out"
            )
        return round(count)
    parallel = _model_ranks(model)
    return (replicas or 1) * (ranks or parallel)
