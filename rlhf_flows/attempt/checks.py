"""Everything that can be known to be wrong before anything starts: flows, names, modules, data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_flows.attempt.description import Checked, Dataset, Description
from rlhf_flows.attempt.placement import check_fits_here
from rlhf_flows.config import EngineConfig
from rlhf_flows.data.rows import load_rows, rows_digest
from rlhf_flows.errors import ConfigError, DataError
from rlhf_flows.graph import BATCH, Graph, phases, trace
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.store import check_run_name
from rlhf_flows.tasks.runtime import DatasetInfo, SyncPair

__all__ = ["check"]


def check(description: Description) -> Checked:
    """Everything that can be known to be wrong before anything starts.

    Raises:
        UserError: names what is wrong, where, and what to do.
    """
    parts = (description.environment, description.trainer, description.evaluator)
    environment, trainer, evaluator = (None if p is None else trace(p.flow) for p in parts)
    modules = _modules([g for g in (environment, trainer, evaluator) if g is not None])
    rollout, scoring = (
        (frozenset[int](), frozenset[int]()) if environment is None else phases(environment)
    )
    _check_names(description.config, modules)
    _check_syncs(description.syncs, modules, trainer)
    if trainer is not None:
        _check_trainer(trainer, description.config)
    if description.config.cluster.address is None:
        check_fits_here(description.config, modules)
    for module in modules.values():
        module.validate()
    dataset = eval_dataset = None
    if description.environment is not None and environment is not None and trainer is not None:
        first = [n for n in environment.nodes if n.id in (rollout or scoring) and BATCH in n.inputs]
        owners: tuple[str, ...] = (first[0].module,)  # the others take the rows from its shards
        dataset = _dataset(description.environment.dataset, owners, modules, is_eval=False)
    elif description.trainer is not None and trainer is not None:
        owners = tuple(n.module for n in trainer.nodes)
        dataset = _dataset(description.trainer.dataset, owners, modules, is_eval=False)
    if description.evaluator is not None and evaluator is not None:
        owners = (evaluator.nodes[0].module,)
        eval_dataset = _dataset(description.evaluator.dataset, owners, modules, is_eval=True)
    return Checked(
        description=description,
        environment=environment,
        trainer=trainer,
        evaluator=evaluator,
        rollout=rollout,
        scoring=scoring,
        syncs=description.syncs,
        modules=modules,
        dataset=dataset,
        eval_dataset=eval_dataset,
    )


def _modules(graphs: Sequence[Graph]) -> dict[str, BaseModule]:
    modules: dict[str, BaseModule] = {}
    for graph in graphs:
        for name, module in graph.modules.items():
            assert isinstance(module, BaseModule)
            if modules.setdefault(name, module) is not module:
                raise ConfigError(
                    f"two modules are named {name!r}, in different flows of one engine: a name is"
                    " a model's identity, so give one of them another"
                )
    return modules


def _check_names(config: EngineConfig, modules: Mapping[str, BaseModule]) -> None:
    for name in modules:
        try:
            check_run_name(name)
        except ConfigError as e:
            raise ConfigError(f"a module cannot be named {name!r}: use letters and digits") from e
    unknown = sorted(set(config.models) - set(modules))
    if unknown:
        raise ConfigError(
            f"models.{unknown[0]} is configured, but no flow calls a module of that name: the"
            f" engine's modules are {', '.join(sorted(modules))}"
        )


def _check_syncs(
    syncs: Sequence[SyncPair], modules: Mapping[str, BaseModule], trainer: Graph | None
) -> None:
    trained = set() if trainer is None else {n.module for n in trainer.nodes}
    for pair in syncs:
        for name in (pair.source, pair.target):
            if name not in modules:
                raise ConfigError(
                    f"set_parameter_sync names {name!r}, which no flow of the engine calls: its"
                    f" modules are {', '.join(sorted(modules))}"
                )
        if pair.source not in trained:
            raise ConfigError(
                f"set_parameter_sync takes weights from {pair.source!r}, which the trainer's flow"
                f" does not train: it trains {', '.join(sorted(trained)) or 'nothing'}"
            )
    targets = [pair.target for pair in syncs]
    for name in targets:
        if targets.count(name) > 1:
            raise ConfigError(f"{name!r} follows two trainers: a module takes weights of one")


def _check_trainer(graph: Graph, config: EngineConfig) -> None:
    for node in graph.nodes:
        if node.inputs != (BATCH,):
            raise ConfigError(
                f"{node.label} of the trainer's flow takes another call's output: a trainer flow"
                " calls each module with the batch itself"
            )
        if config.for_model(node.module).num_replica > 1:
            raise ConfigError(
                f"models.{node.module}.num_replica is"
                f" {config.for_model(node.module).num_replica}, but it is trained: a trained"
                " module has one replica, with data-parallel ranks inside (ranks_per_replica)"
            )
    names = [n.module for n in graph.nodes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"the trainer's flow calls {name!r} twice: one step a batch")


def _dataset(
    source: Any, owners: tuple[str, ...], modules: Mapping[str, BaseModule], *, is_eval: bool
) -> Dataset:
    kind = "evaluator's" if is_eval else "engine's"
    if source is None:
        raise ConfigError(f"the {kind} dataset is missing: give it one with set_dataset(rows)")
    rows = load_rows(source) if isinstance(source, str | Path) else list(source)
    if not rows:
        raise DataError(f"the {kind} dataset is empty: give it at least one row")
    for owner in owners:
        modules[owner].validate_rows(rows, is_eval=is_eval)
    info = DatasetInfo(num_rows=len(rows), digest=rows_digest(rows))
    return Dataset(rows=rows, info=info, owners=owners)
