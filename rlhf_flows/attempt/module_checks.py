"""What a module must have for the part it plays: methods, weights, and a way to its worker.

All of it is read off the class, in the user's program. What a method returns is known only when it
runs: rlhf_flows/pools/user_code.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import cloudpickle

from rlhf_flows.errors import ConfigError
from rlhf_flows.graph import Graph
from rlhf_flows.modules.base import BaseModule

__all__ = ["check_builds", "check_methods", "check_relay_travels", "check_travels", "check_weights"]


def check_methods(graph: Graph, modules: Mapping[str, BaseModule], *, trains: bool) -> None:
    """What is called exists and takes what it will be given."""
    for node in graph.nodes:
        module = modules[node.module]
        kind = type(module)
        _check_place(node.label, node.method, trains=trains)
        if _is_left_out(kind, node.method):
            whose, what = (
                ("trainer's flow", _TRAINS) if trains else ("flow", _TURNS_BATCHES_INTO_BATCHES)
            )
            raise ConfigError(
                f"the {whose} calls {node.label}, but {kind.__name__} defines no"
                f" {_WRITTEN[node.method]}: write one that {what}"
            )
        wanted = "(self, data, iteration)" if trains else "(self, data, iteration=0)"
        given: tuple[Any, ...] = ([], 0) if trains else ({},)
        _check_takes(module, node.method, given, node.options, wanted)
        _check_plain(module, node.method)
    for module in modules.values():
        _check_takes(module, "setup", (), {}, "(self)")
        _check_plain(module, "setup")


def check_builds(module: BaseModule) -> None:
    """The module that comes first in a flow makes the dataset."""
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
    for method in ("build_dataset", "build_all_dataset"):
        _check_takes(module, method, ([],), {"is_eval": False}, "(self, prompts, is_eval=False)")
        _check_plain(module, method)


def check_weights(
    modules: Mapping[str, BaseModule], *, trained: Collection[str], followers: Collection[str]
) -> None:
    """What is trained has weights to keep, what follows it can take them."""
    for names, methods, why in (
        (trained, ("named_weights", "save_pretrained"), "is trained, so its weights are kept"),
        (followers, ("load_weights",), "follows a trained module (set_parameter_sync)"),
    ):
        for name in sorted(names):
            kind = type(modules[name])
            for method in methods:
                if method == "save_pretrained" and kind.is_sharded:
                    method = "export_weights"
                if getattr(kind, method) is getattr(BaseModule, method):
                    raise ConfigError(
                        f"module {name!r} {why}, but {kind.__name__} defines no {method}: make it"
                        " a subclass of TorchModule, whose self.model has the weights, or write"
                        " one"
                    )


def check_travels(module: BaseModule) -> None:
    """A module object is sent to its workers as it is before `setup`."""
    _check_pickles(
        f"module {module.name!r}",
        module,
        f"make files, locks, clients and models in {type(module).__name__}.setup, not in __init__",
    )


def check_relay_travels(relay: Callable[[Any], Any]) -> None:
    """The relay function runs in a worker."""
    _check_pickles("the relay function", relay, "open files, locks and clients inside it")


def _check_pickles(what: str, value: Any, remedy: str) -> None:
    try:
        cloudpickle.dumps(value)
    except Exception as e:  # whatever an attribute of the user's raises
        raise ConfigError(
            f"{what} cannot be sent to its workers ({type(e).__name__}: {e}): {remedy}"
        ) from e


_TURNS_BATCHES_INTO_BATCHES = (
    "takes a batch (a dict of columns) and returns one with a value for each of its rows"
)
_TRAINS = "takes a list of micro-batches and the iteration, and steps the optimizer"
_WRITTEN = {
    "forward_step": "forward_step(data, iteration)",
    "eval_step": "eval_step(data), nor a forward_step that it would call",
    "train_step": "train_step(data, iteration)",
}


def _check_place(label: str, method: str, *, trains: bool) -> None:
    if trains and method in ("forward_step", "eval_step"):
        raise ConfigError(
            f"the trainer's flow calls {label}, which takes one batch, and a trainer's flow gives"
            " it a list of micro-batches: call train_step there, and this in the environment's"
            " flow"
        )
    if not trains and method == "train_step":
        raise ConfigError(
            f"the environment's or the evaluator's flow calls {label}: modules are trained in the"
            " trainer's flow, so call it in Trainer(flow)"
        )


def _is_left_out(kind: type[BaseModule], method: str) -> bool:
    """Whether a method is still the one of the base class, which only says that it is missing."""
    if method not in _WRITTEN or getattr(kind, method) is not getattr(BaseModule, method):
        return False
    return method != "eval_step" or kind.forward_step is BaseModule.forward_step


def _check_takes(
    module: BaseModule,
    method: str,
    args: tuple[Any, ...],
    options: Mapping[str, Any],
    wanted: str,
) -> None:
    try:
        inspect.signature(getattr(module, method)).bind(*args, **options)
    except TypeError as e:
        raise ConfigError(
            f"{type(module).__name__}.{method} of module {module.name!r} cannot be called as it"
            f" will be ({e}): define it as {method}{wanted}"
        ) from e
    except ValueError:  # a callable that does not say what it takes
        return


def _check_plain(module: BaseModule, method: str) -> None:
    function = getattr(module, method)
    if (
        inspect.iscoroutinefunction(function)
        or inspect.isgeneratorfunction(function)
        or inspect.isasyncgenfunction(function)
    ):
        raise ConfigError(
            f"{type(module).__name__}.{method} of module {module.name!r} is defined with `async` or"
            " `yield`, so that calling it runs nothing: define it with a plain `def` and return"
            " the result (asyncio.run(...) inside it runs coroutines)"
        )
