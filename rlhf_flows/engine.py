"""What a user imports: `Engine` and its parts. The programming interface is ChatLearn's.

An engine is a description: flow functions, datasets, which weights follow which. `learn` checks all
of it in this process (`rlhf_flows.attempt`), and only then reaches for a cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from rlhf_flows.attempt import (
    Description,
    Environment,
    Evaluator,
    Part,
    Trainer,
    check,
    check_store,
    is_template,
    run_as_flow,
)
from rlhf_flows.config import EngineConfig
from rlhf_flows.config_loading import load_config, merge_settings
from rlhf_flows.data import Batch
from rlhf_flows.errors import ConfigError, RunCancelledError
from rlhf_flows.flow import RunResult
from rlhf_flows.graph import draw, trace
from rlhf_flows.initialization import initial_config
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.reporting.inspection import release_pools
from rlhf_flows.store import open_store
from rlhf_flows.tasks.backfill import Backfill
from rlhf_flows.tasks.evaluation import evaluated_batches
from rlhf_flows.tasks.progress import Progress
from rlhf_flows.tasks.weights import SyncPair

__all__ = ["Engine", "Environment", "Evaluator", "Trainer"]

T = TypeVar("T")
PartT = TypeVar("PartT", bound=Part)


class Engine:
    """Episodes of environment, trainer and evaluator; each of them may be None."""

    def __init__(
        self,
        environment: Environment | None = None,
        trainer: Trainer | None = None,
        evaluator: Evaluator | None = None,
        name: str = "engine",
    ) -> None:
        self.name = name
        self.environment = _part(Environment, environment)
        self.trainer = _part(Trainer, trainer)
        self.evaluator = _part(Evaluator, evaluator)
        self.config = initial_config()
        self._syncs: list[SyncPair] = []
        self._relay: Callable[[Any], Any] | None = None
        self._last_run: str | None = None
        self._backfill: Backfill | None = None
        self._running: list[Callable[[], None]] = []
        """How to stop what runs, in whichever thread."""

    def set_environment(self, environment: Environment) -> Self:
        self.environment = _part(Environment, environment)
        return self

    def set_trainer(self, trainer: Trainer) -> Self:
        self.trainer = _part(Trainer, trainer)
        return self

    def set_evaluator(self, evaluator: Evaluator) -> Self:
        self.evaluator = _part(Evaluator, evaluator)
        return self

    def set_dataset(self, dataset: Sequence[Any] | str | Path) -> Self:
        """What the episodes start from: rows (a list), or a JSONL, JSON or Parquet file of them."""
        self._starting_part("set_dataset").set_dataset(dataset)
        return self

    def set_multiple_datasets(self, datasets: Sequence[Sequence[Any] | str | Path]) -> Self:
        """Several of them, mixed in each episode by `runtime.data_ratio`."""
        self._starting_part("set_multiple_datasets").set_multiple_datasets(datasets)
        return self

    def _starting_part(self, method: str) -> Part:
        part = self.environment or self.trainer or self.evaluator
        if part is None:
            raise ConfigError(
                f"{method} was called on an engine with neither environment nor trainer: give it"
                " one first"
            )
        return part

    def set_relay_sample_manager(self, relay: Callable[[Any], Any]) -> Self:
        """Training of an episode takes what `relay` returns.

        It is given the last `runtime.max_relay_episode` episodes, each an `EpisodeRelayBuffer` of
        samples (dicts), the newest last, and returns a list of samples. It runs in the trainer's
        worker, from episode `runtime.relay_episode_offset` on, and must depend on its argument
        alone. The samples stay in the store as they were sampled.
        """
        if not callable(relay):
            raise ConfigError(
                f"set_relay_sample_manager was given a {type(relay).__name__}, expected a function"
                " of the episodes' samples that returns a list of samples"
            )
        self._relay = relay
        return self

    set_relay_sample_fn = set_relay_sample_manager

    def set_parameter_sync(
        self, source: BaseModule, target: BaseModule, *, eta: float | None = None
    ) -> Self:
        """`target` holds the weights that `source` trains, or follows them at a distance.

        Args:
            eta: A moving average in place of the weights: version v is eta * weights of v +
                (1 - eta) * version v - 1, version 0 what both begin with. 1 is the weights, 0 what
                they were at first. The reference of a policy that may go far (`reference_ema`).
        """
        for module in (source, target):
            if not isinstance(module, BaseModule):
                raise ConfigError(
                    f"set_parameter_sync was given a {type(module).__name__} ({module!r:.60}):"
                    " give it the modules themselves, the trained one first"
                )
        if source.name == target.name:
            raise ConfigError(
                f"set_parameter_sync was given {source.name!r} twice: a module needs no sync with"
                " itself"
            )
        if eta is not None and not 0.0 <= eta <= 1.0:
            raise ConfigError(
                f"set_parameter_sync was given eta={eta} for {target.name!r}: it is the share of"
                " the newest weights in an average, between 0 and 1"
            )
        self._syncs.append(SyncPair(source=source.name, target=target.name, eta=eta))
        return self

    def configure(self, config: EngineConfig | Mapping[str, Any] | None = None, /) -> Self:
        """Takes a configuration: a model, or the same fields as nested dicts.

        Raises:
            ConfigError: an unknown field (with the nearest right one), or a wrong value.
        """
        if isinstance(config, EngineConfig):
            self.config = config
        elif config is not None and not isinstance(config, Mapping):
            raise ConfigError(
                f"configure was given a {type(config).__name__}, expected nested dicts of fields or"
                " a configuration: rlhf_flows.init(file) reads one from a file"
            )
        elif config is not None:
            fields = self.config.model_dump(mode="json")
            merge_settings(fields, config)
            self.config = load_config(type(self.config), defaults=fields)
        return self

    # ---- running --------------------------------------------------------------------------

    def learn(
        self,
        *,
        takeover: bool = False,
        progress: Progress | None = None,
        **settings: Any,
    ) -> RunResult:
        """Runs all episodes, or what is missing of them; returns when they are done.

        Outside a Prefect flow this starts a flow run; inside one its phases become tasks of that
        flow. Works in scripts, notebooks and flows: it has an event loop in a thread of its own.

        Args:
            takeover: Replace another attempt of this run that is alive.
            progress: Who is told how far it is.
            settings: Fields of the configuration, such as `runtime={"num_episode": 3}`.

        Raises:
            UserError: something asked for is wrong; nothing expensive was started.
            FencedError: a newer attempt took over.
            RunCancelledError: the run was cancelled in Prefect.
            Pause, Abort: of Prefect, inside a flow of one's own: let them pass, they tell its
                engine that the flow run was suspended, or that its state is another's to set.
        """
        return _in_own_loop(lambda: self.alearn(takeover=takeover, progress=progress, **settings))

    async def alearn(
        self,
        *,
        takeover: bool = False,
        progress: Progress | None = None,
        **settings: Any,
    ) -> RunResult:
        """`learn` for callers with an event loop."""
        if settings:
            self.configure(settings)
        description = self._describe(takeover=takeover, progress=progress)
        result = await self._stoppable(run_as_flow(description))
        # Of a backfill that is another run, whose actors are not this engine's to end.
        self._last_run = result.run if self._backfill is None else None
        return result

    async def _stoppable(self, work: Coroutine[Any, Any, T]) -> T:
        """`work`, which `stop` may end from another thread."""
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            loop.call_soon_threadsafe(task.cancel)

        self._running.append(stop)
        try:
            return await task
        except asyncio.CancelledError:
            if not stopped.is_set():
                raise
            raise RunCancelledError(
                "the run was stopped by engine.stop(): start it again by its run_name to resume"
            ) from None
        finally:
            self._running.remove(stop)

    # ---- evaluating and stopping ----------------------------------------------------------

    def evaluate(self, *, takeover: bool = False, **settings: Any) -> dict[str, list[Batch]]:
        """Evaluates the newest policy version of the run, or reads the evaluation that is there.

        Trains nothing. An engine whose run has trained nothing evaluates its models as they are.

        Returns:
            `{module: [batches]}` of the modules whose outputs the evaluator's flow returns; a batch
            holds what the flow returned of some samples, joined.

        Raises:
            As `learn`; ConfigError where the engine has no evaluator.
        """
        if settings:
            self.configure(settings)
        if self.evaluator is None:
            raise ConfigError(
                "evaluate was called on an engine without an evaluator: give it one with"
                " set_evaluator(Evaluator(eval_flow).set_dataset(rows))"
            )
        if self._named is None and self._last_run is not None:
            self.configure({"run_name": self._last_run})
        description = self._describe(takeover=takeover, only_evaluates=True)
        result = _in_own_loop(lambda: self._stoppable(run_as_flow(description)))
        keys = result.evaluated[result.version]
        store = open_store(self.config.store.url)
        return evaluated_batches(trace(self.evaluator.flow), store, keys)

    def stop(self) -> None:
        """Stops what this engine runs, from another thread; ends the actors that its last run left.

        A run that is stopped can be resumed. Does nothing where nothing runs and nothing is left.
        """
        for stop in list(self._running):
            stop()
        address, run = self.config.cluster.address, self._named or self._last_run
        if address is not None and run is not None:
            release_pools(address, run)

    @property
    def _named(self) -> str | None:
        """The run's name where it is given, and no template of one."""
        name = self.config.run_name
        return None if is_template(name) else name

    def graph(self) -> str:
        """The flows as Mermaid text. Raises GraphError where one cannot be traced."""
        return draw(
            {
                name: trace(part.flow)
                for name, part in (
                    ("environment", self.environment),
                    ("trainer", self.trainer),
                    ("evaluator", self.evaluator),
                )
                if part is not None
            },
            [(pair.source, pair.target) for pair in self._syncs],
        )

    # ---- checking -------------------------------------------------------------------------

    def check(self) -> Self:
        """Checks all that can be checked before anything starts. Raises UserError.

        Opens the store, and claims the run's name where the configuration has one.
        """
        check_store(check(self._describe()))
        return self

    def _describe(
        self,
        *,
        takeover: bool = False,
        progress: Progress | None = None,
        only_evaluates: bool = False,
    ) -> Description:
        if self.trainer is None and self.evaluator is None:
            raise ConfigError(
                "the engine has neither trainer nor evaluator, so there is nothing to learn: give"
                " it one with set_trainer or set_evaluator"
            )
        return Description(
            name=self.name,
            config=self.config,
            environment=self.environment,
            trainer=self.trainer,
            evaluator=self.evaluator,
            syncs=tuple(self._syncs),
            takeover=takeover,
            progress=progress,
            relay=self._relay,
            only_evaluates=only_evaluates,
            backfill=self._backfill,
        )


def _part(kind: type[PartT], part: PartT | None) -> PartT | None:
    if part is not None and not isinstance(part, kind):
        raise ConfigError(
            f"an engine's {kind.__name__.lower()} was given as a {type(part).__name__}: make it of"
            f" the flow function, {kind.__name__}(flow)"
        )
    return part


def _in_own_loop(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs a coroutine in a new thread with its own loop, in a copy of this context."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(make())
    context = contextvars.copy_context()
    outcome: list[T] = []
    failure: list[BaseException] = []
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = []
    interrupted = threading.Event()

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        if interrupted.is_set():  # before there was a task to cancel
            raise asyncio.CancelledError
        return await make()

    def work() -> None:
        try:
            outcome.append(context.run(asyncio.run, main()))
        except BaseException as e:
            failure.append(e)

    thread = threading.Thread(target=work, name="rlhf_flows.learn")
    try:
        thread.start()
        thread.join()
    except BaseException:  # Ctrl-C, or the signal by which a worker stops a flow
        interrupted.set()
        for loop, task in running:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it came to its end
                loop.call_soon_threadsafe(task.cancel)
        if thread.is_alive():
            thread.join()
        raise
    if failure:
        raise failure[0]
    return outcome[0]
