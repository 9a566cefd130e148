"""Algorithms as graphs of calls, whose edges follow from the names of what goes in and out.

ReaL's way to write an algorithm (its `MFCDef`), beside plain functions. The decision here: a graph
of calls is turned into the same flows that a user would have written, so there is one engine, and
the two ways give the same bits. What a call takes that no call gives comes from the dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rlhf_flows.engine import Engine, Environment, Evaluator, Trainer
from rlhf_flows.errors import ConfigError
from rlhf_flows.models.interfaces import make_interface
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.modules.interface import Doing, ModelInterface
from rlhf_flows.registry import nearest

__all__ = ["Call", "GraphEngine"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a model: what is done, by which interface, with which columns."""

    name: str
    """Of the call, and of the module that it is made to: "policy", "reward"."""
    do: Doing
    interface: str | type[BaseModule] | BaseModule
    """A registered name, `package.module:Class`, a class, or a module that is made already."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Of the interface, by name."""
    inputs: Sequence[str] = ()
    """Columns that it takes. Those of a training step are what it needs, and it sees all."""
    outputs: Sequence[str] = ()
    """Columns that it gives."""
    known_as: Mapping[str, str] = field(default_factory=dict)
    """{column: the name by which the interface knows it}, of inputs."""
    gives: Mapping[str, str] = field(default_factory=dict)
    """{column: the name by which the interface gives it}, of outputs."""
    follows: str | None = None
    """The training step whose weights it takes at each param sync."""


class GraphEngine(Engine):
    """An engine made of calls."""

    def __init__(self, calls: Sequence[Call], name: str = "graph") -> None:
        """Raises ConfigError where the calls are no graph: a column given twice, a circle, …"""
        _check_calls(calls)
        self.calls = {call.name: call for call in calls}
        self.modules = {call.name: _module(call) for call in calls}
        made = _in_order([call for call in calls if call.do != "train_step"])
        trained = [call for call in calls if call.do == "train_step"]
        self._made = made

        def trainer_flow(batch: Any) -> None:
            for call in trained:
                self.modules[call.name].train_step(batch)  # type: ignore[call-arg]

        super().__init__(
            Environment(self._flow(made, evaluates=False)) if made and trained else None,
            Trainer(trainer_flow) if trained else None,
            None if trained else Evaluator(self._flow(made, evaluates=True)),
            name=name,
        )
        for call in calls:
            if call.follows is not None:
                self.set_parameter_sync(self.modules[call.follows], self.modules[call.name])

    def set_eval_dataset(
        self, dataset: Sequence[Any] | str | Path, *, calls: Sequence[str] | None = None
    ) -> Self:
        """Held-out rows: evaluation makes all calls that do not train, or those of these names."""
        for name in calls or ():
            if name not in self.calls or self.calls[name].do == "train_step":
                raise ConfigError(
                    f"evaluation is to call {name!r}{nearest(name, [c.name for c in self._made])},"
                    f" expected some of {', '.join(c.name for c in self._made)}"
                )
        chosen = [call for call in self._made if calls is None or call.name in calls]
        return self.set_evaluator(
            Evaluator(self._flow(chosen, evaluates=True)).set_dataset(dataset)
        )

    def _flow(self, calls: Sequence[Call], *, evaluates: bool) -> Callable[[Any], Any]:
        makers = {column: call.name for call in calls for column in call.outputs}

        def flow(batch: Any) -> Any:
            found: dict[str, Any] = {}
            for call in calls:
                before = dict.fromkeys(makers[c] for c in call.inputs if c in makers)
                found[call.name] = self.modules[call.name].step_by_keys(
                    batch,
                    *(found[name] for name in before),
                    step="eval_step" if evaluates else "forward_step",
                    inputs=tuple(call.inputs),
                    outputs=tuple(call.outputs),
                    known_as=dict(call.known_as),
                    gives=dict(call.gives),
                )
            # What trains sees the rows of the dataset, too.
            return (batch, *found.values())

        return flow


def _module(call: Call) -> BaseModule:
    module = _made_module(call)
    kind = type(module)
    if call.do == "train_step":
        is_able = kind.train_step is not BaseModule.train_step
    elif isinstance(module, ModelInterface):
        is_able = getattr(kind, call.do) is not getattr(ModelInterface, call.do)
    else:
        is_able = kind.forward_step is not BaseModule.forward_step
        is_able = is_able and (call.do == "generate") == module.generates
    if not is_able:
        raise ConfigError(
            f"call {call.name!r} is to do {call.do!r}, which {kind.__name__} does not: define it"
            " there, or name another interface"
        )
    return module


def _made_module(call: Call) -> BaseModule:
    if not isinstance(call.interface, BaseModule):
        return make_interface(call.interface, call.name, call.args)
    if call.args:
        raise ConfigError(
            f"call {call.name!r} has a module that is made already, and arguments for it: give its"
            " class, or leave the arguments out"
        )
    if call.interface.name != call.name:
        raise ConfigError(
            f"call {call.name!r} is made to a module named {call.interface.name!r}: give both the"
            " same name"
        )
    return call.interface


def _check_calls(calls: Sequence[Call]) -> None:
    if not calls:
        raise ConfigError("a graph of no calls does nothing: give it at least one Call")
    names = [call.name for call in calls]
    makers: dict[str, str] = {}
    trained = [call.name for call in calls if call.do == "train_step"]
    for call in calls:
        if names.count(call.name) > 1:
            raise ConfigError(f"two calls are named {call.name!r}: give one of them another name")
        if call.do == "train_step" and call.outputs:
            raise ConfigError(
                f"call {call.name!r} trains, and trains alone: leave out its outputs,"
                f" {', '.join(call.outputs)}"
            )
        if call.do != "train_step" and not call.outputs:
            raise ConfigError(f"call {call.name!r} has no outputs, so nobody would know of it")
        for names_of, columns, field_name in (
            (call.known_as, call.inputs, "known_as"),
            (call.gives, call.outputs, "gives"),
        ):
            for column in names_of:
                if column not in columns:
                    raise ConfigError(
                        f"{field_name} of call {call.name!r} names {column!r}"
                        f"{nearest(column, list(columns))}, which is not among its columns"
                    )
        for column in call.outputs:
            if column in makers:
                raise ConfigError(
                    f"{column!r} is given by the calls {makers[column]!r} and {call.name!r}: rename"
                    " one of them (gives)"
                )
            makers[column] = call.name
        if call.follows is not None and call.follows not in trained:
            raise ConfigError(
                f"call {call.name!r} follows {call.follows!r}{nearest(call.follows, trained)},"
                f" which trains nothing: the training steps are {', '.join(trained) or 'none'}"
            )


def _in_order(calls: Sequence[Call]) -> list[Call]:
    """Each after those whose outputs it takes; else in the order they were written."""
    makers = {column: call.name for call in calls for column in call.outputs}
    left, done = list(calls), [*()]
    ready: set[str] = set()
    while left:
        free = [
            call for call in left
            if all(makers[c] in ready for c in call.inputs if c in makers)
        ]  # fmt: skip
        if not free:
            raise ConfigError(
                "the calls wait for each other in a circle: "
                + ", ".join(
                    f"{call.name} for {makers[c]} ({c})"
                    for call in left
                    for c in call.inputs
                    if makers.get(c) not in (None, *ready)
                )
            )
        done.append(free[0])
        ready.add(free[0].name)
        left.remove(free[0])
    return done
