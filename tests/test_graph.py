"""The graph: what can be a flow, what is recorded, what is refused, how phases are cut."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import pytest

from rlhf_flows.errors import GraphError
from rlhf_flows.graph import BATCH, is_tracing, phases, trace
from rlhf_flows.modules import BaseModule


class Generator(BaseModule):
    generates = True

    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        return {**data, "made": [1]}


class Scorer(BaseModule):
    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        return data

    def judge(self, *batches: Any, strict: bool = False) -> Any:
        return batches[0]


policy = Generator("policy")
reward = Scorer("reward")


def labels(flow: Any) -> list[str]:
    return [n.label for n in trace(flow).nodes]


# ---- what can be a flow -----------------------------------------------------------------------


def test_a_lambda_is_a_flow() -> None:
    assert labels(lambda b: reward.forward_step(policy.forward_step(b))) == [
        "policy.forward_step",
        "reward.forward_step",
    ]


def test_a_closure_over_modules_is_a_flow() -> None:
    def make(first: BaseModule, second: BaseModule) -> Any:
        def flow(batch: Any) -> Any:
            return second.forward_step(first.forward_step(batch))

        return flow

    assert labels(make(Generator("a"), Scorer("b"))) == ["a.forward_step", "b.forward_step"]


def test_a_method_of_an_object_that_holds_modules_is_a_flow() -> None:
    class Recipe:
        def __init__(self) -> None:
            self.policy = Generator("inner")

        def flow(self, batch: Any) -> Any:
            return self.policy.forward_step(batch)

    assert labels(Recipe().flow) == ["inner.forward_step"]


def test_a_callable_object_and_a_partial_are_flows() -> None:
    class Flow:
        def __call__(self, batch: Any) -> Any:
            return policy.forward_step(batch)

    def two(module: BaseModule, batch: Any) -> Any:
        return module.forward_step(batch)

    assert labels(Flow()) == ["policy.forward_step"]
    assert labels(functools.partial(two, reward)) == ["reward.forward_step"]


def test_helper_functions_and_decorators_are_followed() -> None:
    calls = []

    def counted(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(batch: Any) -> Any:
            calls.append(function.__name__)
            return function(batch)

        return wrapper

    def score(batch: Any) -> Any:
        return reward.forward_step(batch)

    @counted
    def flow(batch: Any) -> Any:
        return score(policy.forward_step(batch))

    assert labels(flow) == ["policy.forward_step", "reward.forward_step"]
    assert calls == ["flow"]


def test_code_without_source_is_a_flow() -> None:
    scope: dict[str, Any] = {"policy": policy}
    exec("def flow(batch):\n    return policy.forward_step(batch)", scope)
    assert labels(scope["flow"]) == ["policy.forward_step"]


def test_loops_and_branches_on_plain_values_are_plain_python() -> None:
    scorers = [Scorer(f"s{i}") for i in range(3)]

    def flow(batch: Any, *, with_policy: bool = False) -> Any:
        start = policy.forward_step(batch) if with_policy else batch
        return [scorer.forward_step(start) for scorer in scorers]

    assert labels(flow) == [f"s{i}.forward_step" for i in range(3)]


def test_a_module_called_with_real_data_while_tracing_is_run_not_recorded() -> None:
    seen = []

    def flow(batch: Any) -> Any:
        seen.append(reward.forward_step({"x": [1]}))
        return policy.forward_step(batch)

    assert labels(flow) == ["policy.forward_step"]
    assert seen == [{"x": [1]}]


# ---- what is recorded -------------------------------------------------------------------------


def test_inputs_and_outputs_are_the_data_flow() -> None:
    def flow(batch: Any) -> Any:
        a = policy.forward_step(batch)
        b = reward.forward_step(a)
        return a, {"scores": b}

    graph = trace(flow)
    assert [n.inputs for n in graph.nodes] == [(BATCH,), (0,)]
    assert graph.outputs == (0, 1)
    assert dict(graph.modules) == {"policy": policy, "reward": reward}


def test_a_call_takes_several_batches_by_position_and_by_name() -> None:
    judge = Scorer("judge")

    def flow(batch: Any) -> Any:
        a, b = policy.forward_step(batch), reward.forward_step(batch)
        return judge.judge(a, b, strict=True), judge.judge(batch, other=b)

    graph = trace(flow)
    assert [n.inputs for n in graph.nodes[2:]] == [(0, 1), (BATCH, 1)]
    assert [dict(n.options) for n in graph.nodes[2:]] == [{"strict": True}, {}]


def test_the_same_module_may_be_called_twice() -> None:
    graph = trace(lambda b: policy.forward_step(policy.forward_step(b)))
    assert [(n.id, n.module, n.inputs) for n in graph.nodes] == [
        (0, "policy", (BATCH,)),
        (1, "policy", (0,)),
    ]
    assert graph.ancestors([1]) == {0, 1}


def test_a_flow_that_returns_nothing_or_its_input_has_such_outputs() -> None:
    def trains(batch: Any) -> None:
        policy.forward_step(batch)

    def passes(batch: Any) -> Any:
        policy.forward_step(batch)
        return batch

    assert trace(trains).outputs == ()
    assert trace(passes).outputs == (BATCH,)


def test_tracing_ends_with_the_trace_also_after_an_error() -> None:
    with pytest.raises(GraphError, match="ZeroDivisionError: division by zero"):
        trace(lambda b: 1 / 0)
    assert not is_tracing()
    assert policy.forward_step({"x": [0]}) == {"x": [0], "made": [1]}


def test_two_traces_of_one_flow_are_equal() -> None:
    def flow(batch: Any) -> Any:
        return reward.forward_step(policy.forward_step(batch))

    assert trace(flow).nodes == trace(flow).nodes


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flow", "what"),
    [
        (lambda b: policy.forward_step(b["prompt"]), "reads ['prompt'] of the batch"),
        (lambda b: policy.forward_step(b)["made"], "reads ['made'] of the output of policy.for"),
        (lambda b: policy.forward_step(b).keys(), "reads `.keys` of the output of policy.forward"),
        (lambda b: len(policy.forward_step(b)), "asks for the length of the output of policy.for"),
        (lambda b: {**policy.forward_step(b)}, "of the output of policy.forward_step"),
        (lambda b: [*policy.forward_step(b)], "iterates over the output of policy.forward_step"),
        (lambda b: policy.forward_step(b) or b, "branches on the output of policy.forward_step"),
        (lambda b: "x" in policy.forward_step(b), "asks whether 'x' is in the output of policy"),
        (lambda b: setattr(b, "x", 1), "sets `.x` of the batch"),
        (lambda b: b.__setitem__("x", 1), "sets ['x'] of the batch"),
    ],
)
def test_touching_data_is_refused_with_what_and_what_to_do(flow: Any, what: str) -> None:
    with pytest.raises(GraphError) as refused:
        trace(flow)
    assert what in str(refused.value)
    assert "Move this step into a module's method" in str(refused.value)


def test_a_flow_that_calls_no_module_is_refused_by_name() -> None:
    def idle(batch: Any) -> Any:
        return batch

    with pytest.raises(GraphError, match="the flow 'idle' called no module with its batch"):
        trace(idle)


def test_a_flow_that_returns_data_is_refused() -> None:
    def flow(batch: Any) -> Any:
        policy.forward_step(batch)
        return 3

    with pytest.raises(GraphError, match=r"the flow 'flow' returned a int, expected what its"):
        trace(flow)


def test_a_positional_constant_is_refused_with_the_way_out() -> None:
    with pytest.raises(GraphError, match=r"positional argument that is no batch \(3\): pass it by"):
        trace(lambda b: policy.forward_step(b, 3))


def test_two_modules_of_one_name_are_refused() -> None:
    with pytest.raises(GraphError, match="two modules are named 'same'"):
        trace(lambda b: Scorer("same").forward_step(Generator("same").forward_step(b)))


def test_a_batch_kept_from_another_trace_is_refused() -> None:
    kept: list[Any] = []

    def first(batch: Any) -> Any:
        kept.append(batch)
        return policy.forward_step(batch)

    trace(first)
    with pytest.raises(GraphError, match="another flow was traced with"):
        trace(lambda b: policy.forward_step(kept[0]))


def test_an_error_of_the_graph_pickles() -> None:
    with pytest.raises(GraphError) as refused:
        trace(lambda b: len(b))
    again = pickle.loads(pickle.dumps(refused.value))
    assert str(again) == str(refused.value)


# ---- phases and pictures ----------------------------------------------------------------------


def test_what_generates_and_what_it_needs_is_rollout_and_the_rest_scoring() -> None:
    retriever, reference = Scorer("retriever"), Scorer("reference")

    def flow(batch: Any) -> Any:
        found = retriever.forward_step(batch)
        sampled = policy.forward_step(found)
        return sampled, reference.forward_step(sampled), reward.forward_step(found)

    graph = trace(flow)
    rollout, scoring = phases(graph)
    names = {n.id: n.module for n in graph.nodes}
    assert {names[i] for i in rollout} == {"retriever", "policy"}
    assert {names[i] for i in scoring} == {"reference", "reward"}


def test_a_second_turn_pulls_what_it_depends_on_into_the_rollout() -> None:
    def flow(batch: Any) -> Any:
        first = policy.forward_step(batch)
        return reward.forward_step(policy.forward_step(reward.forward_step(first)))

    assert phases(trace(flow)) == (frozenset({0, 1, 2}), frozenset({3}))


def test_a_flow_in_which_nothing_generates_has_no_rollout() -> None:
    assert phases(trace(lambda b: reward.forward_step(b))) == (frozenset(), frozenset({0}))


def test_mermaid_draws_every_edge() -> None:
    def flow(batch: Any) -> Any:
        sampled = policy.forward_step(batch)
        return sampled, reward.forward_step(sampled)

    assert trace(flow).mermaid().splitlines() == [
        "flowchart LR",
        "  batch([batch])",
        '  n0["policy.forward_step"]',
        '  n1["reward.forward_step"]',
        "  batch --> n0",
        "  n0 --> n1",
        "  n0 --> out([returned])",
        "  n1 --> out([returned])",
    ]
