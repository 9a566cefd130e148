"""Everything that can be known to be wrong before anything starts: flows, names, modules, data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_flows.attempt.description import Checked, Dataset, Description, Part
from rlhf_flows.attempt.placement import check_fits_here
from rlhf_flows.attempt.shares import shares_of
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
        _check_trainer(trainer)
        _check_methods(trainer, modules, trains=True)
    for graph in (environment, evaluator):
        if graph is not None:
            _check_methods(graph, modules, trains=False)
    trained = frozenset() if trainer is None else {n.module for n in trainer.nodes}
    if environment is not None and description.config.runtime.max_staleness:
        for name in sorted(trained & environment.modules.keys()):
            raise ConfigError(
                f"{name!r} is trained and asked in the environment's flow, so it cannot lag behind"
                f" itself: with runtime.max_staleness={description.config.runtime.max_staleness}"
                " use a second module that follows it (set_parameter_sync), or set it to 0"
            )
    shares = shares_of(description.config, modules, trained=trained)
    _check_relay(description)
    if description.config.cluster.address is None:
        check_fits_here(description.config, shares)
    for module in modules.values():
        module.validate()
    dataset = eval_dataset = None
    only_evaluates = description.only_evaluates
    if only_evaluates:
        pass
    elif description.environment is not None and environment is not None and trainer is not None:
        first = [n for n in environment.nodes if n.id in (rollout or scoring) and BATCH in n.inputs]
        owners: tuple[str, ...] = (first[0].module,)  # the others take the rows from its shards
        dataset = _dataset(
            description.environment, description.config, owners, modules, is_eval=False
        )
    elif description.trainer is not None and trainer is not None:
        owners = tuple(n.module for n in trainer.nodes)
        dataset = _dataset(description.trainer, description.config, owners, modules, is_eval=False)
    if description.evaluator is not None and evaluator is not None:
        owners = (evaluator.nodes[0].module,)
        eval_dataset = _dataset(
            description.evaluator, description.config, owners, modules, is_eval=True
        )
    return Checked(
        description=description,
        environment=environment,
        trainer=trainer,
        evaluator=evaluator,
        rollout=rollout,
        scoring=scoring,
        syncs=description.syncs,
        modules=modules,
        shares=shares,
        opened=frozenset(
            evaluator.modules if only_evaluates and evaluator is not None else modules
        ),
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
        if pair.target in trained:
            raise ConfigError(
                f"set_parameter_sync gives {pair.target!r} the weights of {pair.source!r}, but the"
                " trainer's flow trains it itself: a module is trained, or follows another"
            )
    targets = [pair.target for pair in syncs]
    for name in targets:
        if targets.count(name) > 1:
            raise ConfigError(f"{name!r} follows two trainers: a module takes weights of one")


def _check_relay(description: Description) -> None:
    most = description.config.runtime.max_relay_episode
    if most and description.relay is None:
        raise ConfigError(
            f"runtime.max_relay_episode is {most}, but the engine has no relay function: give it"
            " one with set_relay_sample_manager, or set it to 0"
        )
    if description.relay is not None and not most:
        raise ConfigError(
            "the engine has a relay function, but runtime.max_relay_episode is 0, so it is never"
            " asked: set it to the number of episodes that it is to be shown, -1 for all"
        )
    if most and (description.environment is None or description.trainer is None):
        raise ConfigError(
            "a relay function chooses from the samples of an environment for a trainer, and this"
            " engine lacks one of them: leave it out"
        )


def _check_trainer(graph: Graph) -> None:
    for node in graph.nodes:
        if node.inputs != (BATCH,):
            raise ConfigError(
                f"{node.label} of the trainer's flow takes another call's output: a trainer flow"
                " calls each module with the batch itself"
            )
    names = [n.module for n in graph.nodes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"the trainer's flow calls {name!r} twice: one step a batch")


def _dataset(
    part: Part,
    config: EngineConfig,
    owners: tuple[str, ...],
    modules: Mapping[str, BaseModule],
    *,
    is_eval: bool,
) -> Dataset:
    kind = "evaluator's" if is_eval else "engine's"
    sources, is_mixed = part.datasets, part.is_mixed
    if not sources and not is_eval and config.runtime.data_path is not None:
        path = config.runtime.data_path
        sources, is_mixed = ([path], False) if isinstance(path, str) else (list(path), True)
    if not sources:
        raise ConfigError(f"the {kind} dataset is missing: give it one with set_dataset(rows)")
    parts = [load_rows(s) if isinstance(s, str | Path) else _listed(s, kind) for s in sources]
    for number, part_rows in enumerate(parts):
        if not part_rows:
            which = (
                f"dataset {number} of the {kind} datasets" if is_mixed else f"the {kind} dataset"
            )
            raise DataError(f"{which} is empty: give it at least one row")
    ratio = config.runtime.data_ratio
    if ratio is not None and not is_eval and len(ratio) != len(parts):
        raise ConfigError(
            f"runtime.data_ratio has {len(ratio)} numbers, but there"
            f" {'are' if len(parts) > 1 else 'is'} {len(parts)}"
            f" dataset{'s' if len(parts) > 1 else ''}: give one number for each"
        )
    rows = [row for part_rows in parts for row in part_rows]
    for owner in owners:
        _check_builds(modules[owner])
        modules[owner].validate_rows(rows, is_eval=is_eval)
    is_ranked = any(config.for_model(name).batch_generation.ranking for name in modules)
    sizes = tuple(len(part_rows) for part_rows in parts) if is_mixed else ()
    info = DatasetInfo(
        num_rows=len(rows),
        digest=rows_digest(rows, parts=sizes),
        parts=sizes,
        lengths=tuple(map(_length, rows)) if is_ranked and not is_eval else (),
    )
    return Dataset(rows=rows, info=info, owners=owners)


def _listed(source: Any, kind: str) -> list[Any]:
    try:
        return list(source)
    except TypeError as e:
        raise ConfigError(
            f"the {kind} dataset is a {type(source).__name__}: give set_dataset a list of rows, or"
            " the name of a JSONL, JSON or Parquet file"
        ) from e


def _length(row: Any) -> int:
    """About how long a prompt is: what shards are ranked by."""
    prompt = row.get("prompt", row) if isinstance(row, Mapping) else row
    return len(prompt) if hasattr(prompt, "__len__") else 1


# ---- methods that modules must have ---------------------------------------------------------


def _check_methods(graph: Graph, modules: Mapping[str, BaseModule], *, trains: bool) -> None:
    """What is called exists and takes what it will be given."""
    for node in graph.nodes:
        module = modules[node.module]
        kind = type(module)
        if not trains and _is_left_out(kind, node.method):
            raise ConfigError(
                f"the flow calls {node.label}, but {kind.__name__} defines no"
                f" {_WRITTEN[node.method]}: write one that takes a batch (a dict of columns) and"
                " returns one with a value for each of its rows"
            )
        if trains and _is_left_out(kind, node.method):
            raise ConfigError(
                f"the trainer's flow calls {node.label}, but {kind.__name__} defines no"
                f" {_WRITTEN[node.method]}: write one that takes a list of micro-batches and the"
                " iteration, and steps the optimizer"
            )
        method = getattr(module, node.method)
        given: tuple[Any, ...] = ([], 0) if trains else ({},)
        try:
            inspect.signature(method).bind(*given, **node.options)
        except TypeError as e:
            wanted = "(self, data, iteration)" if trains else "(self, data, iteration=0)"
            raise ConfigError(
                f"{kind.__name__}.{node.method} of module {node.module!r} cannot be called as the"
                f" flow does ({e}): define it as {node.method}{wanted}"
            ) from e
        except ValueError:  # a callable that does not say what it takes
            continue


_WRITTEN = {
    "forward_step": "forward_step(data, iteration)",
    "eval_step": "eval_step(data), nor a forward_step that it would call",
    "train_step": "train_step(data, iteration)",
}


def _is_left_out(kind: type[BaseModule], method: str) -> bool:
    """Whether a method is still the one of the base class, which only says that it is missing."""
    if method not in _WRITTEN or getattr(kind, method) is not getattr(BaseModule, method):
        return False
    return method != "eval_step" or kind.forward_step is BaseModule.forward_step


def _check_builds(module: BaseModule) -> None:
    kind = type(module)
    if (
        kind.build_dataset is BaseModule.build_dataset
        and kind.build_all_dataset is BaseModule.build_all_dataset
    ):
        raise ConfigError(
            f"module {module.name!r} comes first in its flow, but {kind.__name__} defines no"
            " build_dataset(prompts, is_eval): write one that returns a torch Dataset of the rows"
            " that set_dataset was given"
        )
