"""A flow function, called once with a symbolic batch, becomes a graph of module calls.

No source is read and no syntax tree parsed, so lambdas, closures, methods, notebooks and REPLs all
work. While a flow is traced, a method of a module that is called with a symbolic batch is recorded
instead of run (`rlhf_flows.modules.base` asks `record` for every call); everything else in the
function runs as the plain Python it is, and is ignored. Knows nothing of Ray or Prefect.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NoReturn, Protocol

from rlhf_flows.errors import GraphError, RlhfFlowsError

__all__ = [
    "BATCH",
    "ControlDependencies",
    "Graph",
    "Node",
    "SymbolicBatch",
    "TracedModule",
    "draw",
    "phases",
    "record",
    "trace",
]

BATCH = -1
"""The id of the input batch: what the dataset gives, not a node."""

_MOST_CALLS = 1000
"""Of one flow: far more than any needs, few enough that an endless one is found at once."""


class TracedModule(Protocol):
    """What tracing asks of a module."""

    @property
    def name(self) -> str: ...

    @property
    def generates(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One call of one module's method."""

    id: int
    module: str
    method: str
    inputs: tuple[int, ...]
    """Ids of the nodes whose outputs it takes, in order; later ones win where keys collide."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the call that are not batches."""
    after: tuple[int, ...] = ()
    """Ids of nodes that it waits for and takes nothing of."""

    @property
    def label(self) -> str:
        return f"{self.module}.{self.method}"

    @property
    def call(self) -> str:
        """The call with its inputs, such as `reward.forward_step(0, 1)`; -1 is the batch."""
        options = [f"{name}={value!r}" for name, value in sorted(self.options.items())]
        return f"{self.label}({', '.join([*map(str, self.inputs), *options])})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Nodes in the order they were called, which is a topological order."""

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    """Ids of the nodes whose outputs the flow returned; `BATCH` where it returned its input."""
    modules: Mapping[str, TracedModule]

    def ancestors(self, ids: Sequence[int]) -> frozenset[int]:
        """The nodes that `ids` depend on, themselves included."""
        seen: set[int] = set()
        todo = [i for i in ids if i != BATCH]
        while todo:
            node = self.nodes[todo.pop()]
            if node.id not in seen:
                seen.add(node.id)
                todo += [i for i in (*node.inputs, *node.after) if i != BATCH]
        return frozenset(seen)

    def mermaid(self) -> str:
        """The graph as Mermaid text, for a README or a Markdown artifact."""
        lines = ["flowchart LR", "  batch([batch])"]
        lines += [f'  n{node.id}["{node.label}"]' for node in self.nodes]
        for node in self.nodes:
            lines += [f"  {_mermaid_id(i)} --> n{node.id}" for i in node.inputs]
            lines += [f"  {_mermaid_id(i)} -.-> n{node.id}" for i in node.after]
        lines += [f"  {_mermaid_id(i)} --> out([returned])" for i in self.outputs]
        return "\n".join(lines)


def _mermaid_id(node_id: int) -> str:
    return "batch" if node_id == BATCH else f"n{node_id}"


def draw(graphs: Mapping[str, Graph], syncs: Sequence[tuple[str, str]] = ()) -> str:
    """Several graphs as one Mermaid text, with the modules whose weights others follow.

    Args:
        graphs: By name; each becomes a box.
        syncs: (trained module, module that takes its weights).
    """
    lines = ["flowchart LR"]
    first_of: dict[str, str] = {}
    for title, graph in graphs.items():
        lines.append(f"  subgraph {title}")
        ids = {BATCH: f"{title}_batch", **{n.id: f"{title}_n{n.id}" for n in graph.nodes}}
        lines.append(f"    {ids[BATCH]}([batch])")
        lines += [f'    {ids[n.id]}["{n.label}"]' for n in graph.nodes]
        for node in graph.nodes:
            first_of.setdefault(f"{title}/{node.module}", ids[node.id])
            lines += [f"    {ids[i]} --> {ids[node.id]}" for i in node.inputs]
            lines += [f"    {ids[i]} -.-> {ids[node.id]}" for i in node.after]
        if graph.outputs:
            lines.append(f"    {title}_out([returned])")
            lines += [f"    {ids[i]} --> {title}_out" for i in graph.outputs]
        lines.append("  end")
    for source, target in syncs:
        ends = [
            next((first_of[f"{t}/{name}"] for t in titles if f"{t}/{name}" in first_of), None)
            for name, titles in ((source, ("trainer",)), (target, ("environment", "evaluator")))
        ]
        if None not in ends:
            lines.append(f"  {ends[0]} == weights ==> {ends[1]}")
    return "\n".join(lines)


class SymbolicBatch:
    """Stands for a batch while a flow is traced. It has no data, and says so when asked for any."""

    __slots__ = ("_node_id", "_tracer")

    def __init__(self, tracer: _Tracer, node_id: int) -> None:
        object.__setattr__(self, "_tracer", tracer)
        object.__setattr__(self, "_node_id", node_id)

    def _refuse(self, what: str) -> NoReturn:
        where = "the batch" if self._node_id == BATCH else f"the output of {self._label()}"
        raise GraphError(
            f"the flow function {what} {where} while it is traced, but no data exists yet: a flow"
            " only says which module is called with what. Move this step into a module's method"
            " (for example the `forward_step` of a BaseModule) and call that with the batch."
        )

    def _label(self) -> str:
        return self._tracer.nodes[self._node_id].label

    def __getattr__(self, name: str) -> NoReturn:
        # Python itself probes for dunders (copy, inspect, pickling); those are no use of data.
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f"reads `.{name}` of")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        self._refuse(f"sets `.{name}` of")

    def __getitem__(self, key: object) -> NoReturn:
        self._refuse(f"reads [{key!r}] of")

    def __setitem__(self, key: object, value: object) -> NoReturn:
        self._refuse(f"sets [{key!r}] of")

    def __contains__(self, key: object) -> NoReturn:
        self._refuse(f"asks whether {key!r} is in")

    def __iter__(self) -> NoReturn:
        self._refuse("iterates over")

    def __len__(self) -> NoReturn:
        self._refuse("asks for the length of")

    def __bool__(self) -> NoReturn:
        self._refuse("branches on")

    def __repr__(self) -> str:
        return "SymbolicBatch()" if self._node_id == BATCH else f"SymbolicBatch({self._label()})"


class _Tracer:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.modules: dict[str, TracedModule] = {}
        self.waiting: list[tuple[SymbolicBatch, ...]] = []
        """What calls wait for, of each `ControlDependencies` that is open."""


class ControlDependencies:
    """Within it, calls wait for those whose outputs it was given, and take nothing of them:

    with ControlDependencies(value_out):
        policy_trainer.train_step(batch)
    """

    def __init__(self, *outputs: Any) -> None:
        self._outputs = tuple(_flattened(outputs))
        for output in self._outputs:
            if not isinstance(output, SymbolicBatch):
                raise GraphError(
                    f"ControlDependencies was given a {type(output).__name__}: give it what calls"
                    " of modules returned in this flow"
                )

    def __enter__(self) -> None:
        tracer = _tracing.get()
        if tracer is None:
            raise GraphError("ControlDependencies orders the calls of a flow: use it inside of one")
        tracer.waiting.append(self._outputs)

    def __exit__(self, *_: object) -> None:
        tracer = _tracing.get()
        if tracer is not None:
            tracer.waiting.pop()


def _flattened(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flattened(value)
        else:
            yield value


_tracing: ContextVar[_Tracer | None] = ContextVar("rlhf_flows_tracing", default=None)


def record(
    module: TracedModule, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> SymbolicBatch | None:
    """Records the call if a flow is being traced and it takes a symbolic batch; else None."""
    tracer = _tracing.get()
    if tracer is None:
        return None
    symbols = [a for a in (*args, *kwargs.values()) if isinstance(a, SymbolicBatch)]
    if not symbols:
        return None
    call = f"{module.name}.{method}"
    waited = [symbol for outputs in tracer.waiting for symbol in outputs]
    for symbol in (*symbols, *waited):
        if symbol._tracer is not tracer:
            raise GraphError(
                f"{call} was called with a batch that another flow was traced with: a flow may use"
                " its own argument only, not one kept from an earlier call"
            )
    constants = [a for a in args if not isinstance(a, SymbolicBatch)]
    if constants:
        raise GraphError(
            f"{call} was called with a positional argument that is no batch ({constants[0]!r}):"
            " pass it by name, so that it reaches the method as an option of every call"
        )
    known = tracer.modules.setdefault(module.name, module)
    if known is not module:
        raise GraphError(
            f"two modules are named {module.name!r}: a name is a model's identity in the"
            " configuration, the pools and the store, so give one of them another"
        )
    if len(tracer.nodes) == _MOST_CALLS:
        raise GraphError(
            f"the flow has called modules {_MOST_CALLS} times, {call} the last, and goes on: its"
            " loop does not end, as no data exists that could end it. Give the loop a number of"
            " turns, or move it into a module's method"
        )
    node = Node(
        id=len(tracer.nodes),
        module=module.name,
        method=method,
        inputs=tuple(s._node_id for s in symbols),
        options={k: v for k, v in kwargs.items() if not isinstance(v, SymbolicBatch)},
        after=tuple(dict.fromkeys(s._node_id for s in waited if s._node_id != BATCH)),
    )
    tracer.nodes.append(node)
    return SymbolicBatch(tracer, node.id)


@contextmanager
def _traced(tracer: _Tracer) -> Iterator[None]:
    token = _tracing.set(tracer)
    try:
        yield
    finally:
        _tracing.reset(token)


def is_tracing() -> bool:
    """Whether a flow is being traced in this context."""
    return _tracing.get() is not None


def trace(flow: Callable[[Any], Any]) -> Graph:
    """Calls `flow` once with a symbolic batch and returns what it called.

    Raises:
        GraphError: the flow touches the batch's data, calls no module, returns something that is
            no batch, or uses two modules of one name.
    """
    name = getattr(flow, "__name__", type(flow).__name__)
    tracer = _Tracer()
    with _traced(tracer):
        try:
            returned = flow(SymbolicBatch(tracer, BATCH))
        except RlhfFlowsError:
            raise
        except AttributeError as e:
            raise GraphError(f"the flow {name!r} {_missing_method(e)}") from e
        except Exception as e:
            raise GraphError(
                f"the flow {name!r} failed while it was traced ({type(e).__name__}: {e}): it is"
                " called once with a batch that has no data, and has only to call methods of"
                " modules, for example `policy.forward_step(batch)`"
            ) from e
    if inspect.iscoroutine(returned) or inspect.isgenerator(returned):
        kind = "generator" if inspect.isgenerator(returned) else "coroutine"
        returned.close()
        raise GraphError(
            f"the flow {name!r} returned a {kind}, so that none of it ran: define it with a plain"
            " `def`, without `async` or `yield`"
        )
    if not tracer.nodes:
        raise GraphError(
            f"the flow {name!r} called no module with its batch, so there is nothing to run: call"
            " a method of a module with the batch, for example `policy.forward_step(batch)`"
        )
    outputs = tuple(s._node_id for s in _symbols(returned, name))
    return Graph(nodes=tuple(tracer.nodes), outputs=outputs, modules=dict(tracer.modules))


def _missing_method(error: AttributeError) -> str:
    owner: Any = error.obj
    method = error.name
    if getattr(type(owner), "generates", None) is None:  # not of a module
        return (
            f"failed while it was traced (AttributeError: {error}): it has only to call methods of"
            " modules, for example `policy.forward_step(batch)`"
        )
    names = [n for n in dir(type(owner)) if not n.startswith("_")]
    near = get_close_matches(method or "", names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"define it in {type(owner).__name__}"
    return f"calls {owner.name}.{method}, which {type(owner).__name__} does not have: {hint}"


def _symbols(returned: Any, flow_name: str) -> Iterator[SymbolicBatch]:
    if returned is None:
        return
    if isinstance(returned, SymbolicBatch):
        yield returned
    elif isinstance(returned, Mapping):
        yield from (s for v in returned.values() for s in _symbols(v, flow_name))
    elif isinstance(returned, tuple | list):
        yield from (s for v in returned for s in _symbols(v, flow_name))
    else:
        raise GraphError(
            f"the flow {flow_name!r} returned a {type(returned).__name__}, expected what its"
            " modules returned (one batch, or a tuple, list or dict of them), or nothing"
        )


def phases(graph: Graph) -> tuple[frozenset[int], frozenset[int]]:
    """Cuts an environment's graph: ids of the rollout nodes, ids of the scoring nodes.

    Calls of modules that generate (`generates`), with everything they depend on, are the rollout;
    the rest is scoring. A flow in which nothing generates has an empty rollout.
    """
    rollout = graph.ancestors([n.id for n in graph.nodes if graph.modules[n.module].generates])
    return rollout, frozenset(n.id for n in graph.nodes) - rollout
