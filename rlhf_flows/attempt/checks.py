"""Everything that can be known to be wrong before anything starts: flows, names, modules, data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_flows.attempt.description import Checked, Dataset, Description, Part
from rlhf_flows.attempt.module_checks import (
    check_builds,
    check_methods,
    check_relay_travels,
    check_travels,
    check_weights,
)
from rlhf_flows.attempt.parents import begin_from_parent
from rlhf_flows.attempt.placement import check_fits_here
from rlhf_flows.attempt.shares import Share, shares_of
from rlhf_flows.config import EngineConfig, RuntimeEnvConfig
from rlhf_flows.data.row_sequences import JoinedRows, LazyRows, LoadedRows, check_ids, columns_of
from rlhf_flows.data.rows import load_rows, rows_digest
from rlhf_flows.errors import ConfigError, DataError
from rlhf_flows.graph import BATCH, Graph, phases, trace
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.store import check_run_name
from rlhf_flows.tasks.runtime import DatasetInfo
from rlhf_flows.tasks.weights import SyncPair

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
    _check_parts(description)
    _check_names(description, modules)
    _check_syncs(description.syncs, modules, trainer)
    if trainer is not None:
        _check_trainer(trainer)
        check_methods(trainer, modules, trains=True)
    for graph in (environment, evaluator):
        if graph is not None:
            check_methods(graph, modules, trains=False)
    trained = frozenset() if trainer is None else {n.module for n in trainer.nodes}
    check_weights(modules, trained=trained, followers=[pair.target for pair in description.syncs])
    begin_from_parent(description.config, modules, trained=trained, syncs=description.syncs)
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
    for name in sorted(trained):
        _check_micro_batches(description.config, modules[name], shares[name])
    _check_runtime_env(description.config.runtime_env)
    for module in modules.values():
        module.validate()
        check_travels(module)
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


def _check_parts(description: Description) -> None:
    """What is said and would have no effect."""
    if (
        description.environment is not None
        and description.trainer is None
        and not description.only_evaluates
    ):
        raise ConfigError(
            "the engine has an environment, but no trainer that takes its samples: give it one with"
            " set_trainer, or leave the environment out"
        )


def _check_names(description: Description, modules: Mapping[str, BaseModule]) -> None:
    config = description.config
    if config.run_name is None:  # the run is named after the engine
        try:
            check_run_name(description.name)
        except ConfigError as e:
            raise ConfigError(
                f"an engine cannot be named {description.name!r}, as its runs are named after it:"
                " use letters, digits, '.', '_' and '-', or give run_name"
            ) from e
    for name in modules:
        try:
            check_run_name(name)
        except ConfigError as e:
            raise ConfigError(
                f"a module cannot be named {name!r}: use letters, digits, '.', '_' and '-', as in"
                " 'policy'"
            ) from e
    unknown = sorted(set(config.models) - set(modules))
    if unknown:
        raise ConfigError(
            f"models.{unknown[0]} is configured, but no flow calls a module of that name: the"
            f" engine's modules are {', '.join(sorted(modules))}"
        )


def _check_micro_batches(config: EngineConfig, module: BaseModule, share: Share) -> None:
    """Where the module leaves the cutting to us, each rank must get as many micro-batches."""
    micro, batch = config.runtime.train_micro_batch_size, config.runtime.samples_per_batch
    ranks = share.ranks_per_replica
    if micro is None or type(module).micro_batches is not BaseModule.micro_batches:
        return
    if (batch // micro) % ranks:
        raise ConfigError(
            f"a training batch of {batch} samples is {batch // micro} micro-batches of"
            f" runtime.train_micro_batch_size={micro}, which the {ranks} ranks of {module.name!r}"
            f" cannot share evenly: choose runtime.train_global_batch_size as a multiple of"
            f" {micro * ranks}"
        )


def _check_runtime_env(env: RuntimeEnvConfig) -> None:
    """Files and folders of this machine that are to be sent to workers are there."""
    named = [("py_modules", path) for path in env.py_modules]
    named += [] if env.working_dir is None else [("working_dir", env.working_dir)]
    named += [("pip", env.pip)] if isinstance(env.pip, str) else []
    for field, path in named:
        if "://" not in path and not Path(path).exists():
            raise ConfigError(
                f"runtime_env.{field} names {path!r}, which is not there: give a path from"
                f" {Path.cwd()}, or an absolute one"
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
        if pair.eta is not None:
            _check_average(pair, modules)
        if pair.target in trained:
            raise ConfigError(
                f"set_parameter_sync gives {pair.target!r} the weights of {pair.source!r}, but the"
                " trainer's flow trains it itself: a module is trained, or follows another"
            )
    targets = [pair.target for pair in syncs]
    for name in targets:
        if targets.count(name) > 1:
            raise ConfigError(f"{name!r} follows two trainers: a module takes weights of one")


def _check_average(pair: SyncPair, modules: Mapping[str, BaseModule]) -> None:
    source, target = (getattr(modules[n], "path", None) for n in (pair.source, pair.target))
    if source is not None and target is not None and source != target:
        raise ConfigError(
            f"{pair.target!r} follows the average of {pair.source!r}, which begins at the weights"
            f" in {str(source)!r}, but it is made from {str(target)!r}: give both the same path"
        )


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
    if description.relay is not None:
        check_relay_travels(description.relay)


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
    fields = dict.fromkeys(f for owner in owners for f in modules[owner].row_fields(is_eval))
    parts = [
        load_rows(s, fields=tuple(fields)) if isinstance(s, str | Path) else _listed(s, kind)
        for s in sources
    ]
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
    rows = JoinedRows(parts) if is_mixed else parts[0]
    # Large files are looked at one by one: of columns that differ, rows would have to be copied.
    is_large = is_mixed and any(columns_of(part_rows) is not None for part_rows in parts)
    for owner in owners:
        check_builds(modules[owner])
        for given in parts if is_large else [rows]:
            modules[owner].validate_rows(given, is_eval=is_eval)
    is_ranked = any(config.for_model(name).batch_generation.ranking for name in modules)
    sizes = tuple(len(part_rows) for part_rows in parts) if is_mixed else ()
    info = DatasetInfo(
        num_rows=len(rows),
        digest=rows_digest(rows, parts=sizes),
        parts=sizes,
        lengths=tuple(map(_length, rows)) if is_ranked and not is_eval else (),
    )
    return Dataset(rows=rows, info=info, owners=owners)


def _listed(source: Any, kind: str) -> Sequence[Any]:
    # What can be read once only, or in no order of its own, would be other rows when it is resumed.
    is_listed = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if not is_listed or isinstance(source, Mapping | bytes):
        raise ConfigError(
            f"the {kind} dataset is a {type(source).__name__}: give set_dataset a list of rows, or"
            " the name of a JSONL, JSON or Parquet file"
        )
    if isinstance(source, LazyRows | LoadedRows):
        return source  # they were checked when they were loaded
    # A torch Dataset need not end by itself.
    rows = list(source) if hasattr(source, "__iter__") else [source[i] for i in range(len(source))]
    check_ids(rows)
    return rows


def _length(row: Any) -> int:
    """About how long a prompt is: what shards are ranked by."""
    prompt = row.get("prompt", row) if isinstance(row, Mapping) else row
    return len(prompt) if hasattr(prompt, "__len__") else 1
