"""Graphs of calls: what follows from the names of columns, and what is no graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_flows import BaseModule, Call, GraphEngine, ModelInterface, register_interface
from rlhf_flows.errors import ConfigError, DataError
from rlhf_flows.generation import GenerationSettings
from rlhf_flows.graph import trace
from rlhf_flows.models.interfaces import make_interface
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.modules.keyed_step import call_by_keys
from tests.end_to_end.whole_run import (
    assert_exactly_once,
    learn,
    shard_digests,
    toy_engine,
    weight_digests,
)
from tests.toys import ToyPolicy, ToyReward, ToyTrainer

PROMPTS = [{"prompt": str(i)} for i in range(64)]
HELD_OUT = [{"prompt": f"eval {i}"} for i in range(16)]

POLICY = Call(
    name="policy", do="generate", interface=ToyPolicy, inputs=("prompt",),
    outputs=("completion", "response_ids", "digit"), follows="trainer",
)  # fmt: skip
REWARD = Call(
    name="reward", do="inference", interface=ToyReward, inputs=("digit",),
    outputs=("reward", "exact"),
)  # fmt: skip
TRAINER = Call(name="trainer", do="train_step", interface=ToyTrainer, inputs=("digit", "reward"))


class Shout(ModelInterface):
    """As a user writes one: other names for its columns than the graph's."""

    def inference(self, data: dict[str, Any]) -> dict[str, Any]:
        assert set(data) == {"text", "sample_id"}
        return {"loud": [text.upper() for text in data["text"]], "beside": data["text"]}


def test_edges_follow_from_columns_whatever_the_order_of_the_calls() -> None:
    engine = GraphEngine([TRAINER, REWARD, POLICY])
    assert engine.environment is not None
    assert engine.trainer is not None
    graph = trace(engine.environment.flow)
    assert [n.module for n in graph.nodes] == ["policy", "reward"]
    assert [n.inputs for n in graph.nodes] == [(-1,), (-1, 0)]
    assert [n.label for n in trace(engine.trainer.flow).nodes] == ["trainer.train_step"]


def test_an_interface_sees_its_columns_under_its_own_names_and_gives_no_others() -> None:
    data = {"completion": ["a", "b"], "secret": ["x", "y"], "sample_id": ["1", "2"]}
    keys: dict[str, Any] = {
        "inputs": ("completion",), "known_as": {"completion": "text"},
    }  # fmt: skip
    module = Shout("shout")
    found = call_by_keys(
        module.forward_step, module.name, data, outputs=("cry",), gives={"cry": "loud"}, **keys
    )
    assert found == {"cry": ["A", "B"]}
    with pytest.raises(DataError, match="was to give 'cry', and gave beside, loud"):
        call_by_keys(module.forward_step, module.name, data, outputs=("cry",), gives={}, **keys)
    with pytest.raises(DataError, match=r"needs 'completions', .* \(nearest: 'completion'\)"):
        call_by_keys(
            module.forward_step,
            module.name,
            data,
            outputs=("loud",),
            gives={},
            **{**keys, "inputs": ("completions",)},
        )


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([], "a graph of no calls"),
        ([POLICY, POLICY, TRAINER], "two calls are named 'policy'"),
        (
            [POLICY, REWARD, Call(name="judge", do="inference", interface=ToyReward,
                                  outputs=("reward",)), TRAINER],
            "'reward' is given by the calls 'reward' and 'judge'",
        ),
        (
            [
                Call(name="a", do="inference", interface=Shout, inputs=("y",), outputs=("x",)),
                Call(name="b", do="inference", interface=Shout, inputs=("x",), outputs=("y",)),
            ],
            r"in a circle: a for b \(y\), b for a \(x\)",
        ),
        ([POLICY, REWARD], r"'policy' follows 'trainer', which trains nothing"),
        (
            [Call(name="shout", do="generate", interface=Shout, outputs=("x",))],
            "'shout' is to do 'generate', which Shout does not",
        ),
        (
            [Call(name="reward", do="generate", interface=ToyReward, outputs=("x",))],
            "'reward' is to do 'generate', which ToyReward does not",
        ),
        (
            [Call(name="reward", do="train_step", interface=ToyReward)],
            "'reward' is to do 'train_step', which ToyReward does not",
        ),
        ([Call(name="shout", do="inference", interface=Shout)], "'shout' has no outputs"),
        (
            [Call(name="t", do="train_step", interface=ToyTrainer, outputs=("loss",))],
            "'t' trains, and trains alone",
        ),
        (
            [Call(name="s", do="inference", interface=Shout, inputs=("completion",),
                  known_as={"completions": "text"}, outputs=("loud",))],
            r"known_as of call 's' names 'completions' \(nearest: 'completion'\)",
        ),
        (
            [Call(name="r", do="inference", interface="reward_modle", outputs=("reward",))],
            r"unknown interface 'reward_modle' \(nearest: 'reward_model'\)",
        ),
        (
            [Call(name="r", do="inference", interface=ToyReward, args={"gaol": 3},
                  outputs=("reward",))],
            r"takes no 'gaol' \(nearest: 'goal'\)",
        ),
        (
            [Call(name="r", do="inference", interface="reward_model", outputs=("reward",))],
            "interface 'reward_model' needs 'path'",
        ),
        (
            [Call(name="r", do="inference", interface=ToyReward("other"), outputs=("reward",))],
            "is made to a module named 'other'",
        ),
    ],
)  # fmt: skip
def test_what_is_no_graph_is_refused(calls: list[Call], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GraphEngine(calls)


def test_evaluation_makes_the_calls_it_is_told() -> None:
    engine = GraphEngine([POLICY, REWARD, TRAINER]).set_eval_dataset(HELD_OUT, calls=["policy"])
    assert engine.evaluator is not None
    assert [n.module for n in trace(engine.evaluator.flow).nodes] == ["policy"]
    with pytest.raises(ConfigError, match=r"'rewards' \(nearest: 'reward'\)"):
        engine.set_eval_dataset(HELD_OUT, calls=["rewards"])


def test_a_registered_interface_is_found_by_its_name() -> None:
    register_interface("shout", Shout)
    module = make_interface("shout", "loud")
    assert type(module) is Shout
    assert module.name == "loud"
    assert not module.generates
    with pytest.raises(ConfigError, match="expected a class derived from ModelInterface"):
        register_interface("text", str)  # type: ignore[type-var]
    with pytest.raises(ConfigError, match="one of rlhf_flows' own"):
        register_interface("sft", Shout)


def test_what_generates_is_known_from_its_class() -> None:
    class Writer(ModelInterface):
        def generate(self, data: dict[str, Any]) -> dict[str, Any]:
            return {"completion": data["prompt"]}

    assert Writer.generates
    assert Writer("w").forward_step({"prompt": ["a"]}) == {"completion": ["a"]}
    assert isinstance(Writer("w"), BaseModule)
    with pytest.raises(ConfigError, match="defines no inference"):
        Writer("w").inference({})


@pytest.mark.slow
@pytest.mark.usefixtures("services")
def test_a_graph_of_calls_is_the_flow_that_it_describes_bit_for_bit(
    tmp_path: Path, services: str
) -> None:
    calls = GraphEngine([TRAINER, REWARD, POLICY], name="toy").set_dataset(PROMPTS)
    calls.set_eval_dataset(HELD_OUT)
    by_calls = learn(calls, tmp_path, "calls", eval_episode_interval=1)
    by_flow = learn(toy_engine(), tmp_path, "flow", eval_episode_interval=1)
    assert weight_digests(tmp_path, "calls") == weight_digests(tmp_path, "flow")
    assert by_calls.evaluations == by_flow.evaluations
    assert_exactly_once(tmp_path, "calls", episodes=3)
    assert len(shard_digests(tmp_path, "calls")) == len(shard_digests(tmp_path, "flow"))


def by_length(completion: str) -> float:
    return float(len(completion))


@pytest.mark.slow
@pytest.mark.usefixtures("services")
def test_the_graph_of_the_guide_trains_a_real_model(tmp_path: Path) -> None:
    """As the page has it, but for where things are and how many there are."""
    page = Path("docs/from_real.md").read_text("utf-8")
    program = page.split("## A graph of calls")[1].split("```python\n")[1].split("```")[0]
    model = build_tiny_qwen2(tmp_path / "model", hidden_size=32, num_layers=1)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{i}+1="}}\n' for i in range(16)), encoding="utf-8")
    for there, here in {
        '"vllm_policy", args={"path": "model"}':
            f'"torch_policy", args={{"path": "{model}", "generation": SHORT}}',
        '"model"': f'"{model}"',
        "my_rewards:score": "tests.test_calls:by_length",
        "prompts.jsonl": str(prompts),
        ".learn()": "",
    }.items():  # fmt: skip
        assert there in program
        program = program.replace(there, here)
    made: dict[str, Any] = {"SHORT": GenerationSettings(max_new_tokens=4)}
    exec(program, made)
    done = learn(made["engine"], tmp_path / "runs", "graph", num_episode=1)
    assert done.version == 1
    assert "reward" in done.episodes[0]
