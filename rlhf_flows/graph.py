"""A flow function, called once with a symbolic batch, becomes a graph of module calls.

No source is read and no syntax tree parsed, so lambdas, closures, methods, notebooks and REPLs all
work. While a flow is traced, a method of a module that is called with a symbolic batch is recorded
instead of run (`rlhf_flows.modules.base` asks `record` for every call); everything else in the
function runs as the plain Python it is, and is ignored. Knows nothing of Ray or Prefect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from rlhf_flows.errors import GraphError

__all__ = ["BATCH", "Graph", "Node", "SymbolicBatch", "TracedModule", "phases", "record", "trace"]

BATCH = -1
"""The id of the input batch: what the dataset gives, not a node."""


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

    @property
    def label(self) -> str:
        return f"{self.module}.{self.method}"


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
                todo += [i for i in node.inputs if i != BATCH]
        return frozenset(seen)

    def mermaid(self) -> str:
        """The graph as Mermaid text, for a README or a Markdown artifact."""
        lines = ["flowchart LR", "  batch([batch])"]
        lines += [f'  n{node.id}["{node.label}"]' for node in self.nodes]
        for node in self.nodes:
            lines += [f"  {_mermaid_id(i)} --> n{node.id}" for i in node.inputs]
        lines += [f"  {_mermaid_id(i)} --> out([returned])" for i in self.outputs]
        return "\n".join(lines)


def _mermaid_id(node_id: int) -> str:
    return "batch" if node_id == BATCH else f"n{node_id}"


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
    for symbol in symbols:
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
    node = Node(
        id=len(tracer.nodes),
        module=module.name,
        method=method,
        inputs=tuple(s._node_id for s in symbols),
        options={k: v for k, v in kwargs.items() if not isinstance(v, SymbolicBatch)},
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
        returned = flow(SymbolicBatch(tracer, BATCH))
    if not tracer.nodes:
        raise GraphError(
            f"the flow {name!r} called no module with its batch, so there is nothing to run: call"
            " a method of a module with the batch, for example `policy.forward_step(batch)`"
        )
    outputs = tuple(s._node_id for s in _symbols(returned, name))
    return Graph(nodes=tuple(tracer.nodes), outputs=outputs, modules=dict(tracer.modules))


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
