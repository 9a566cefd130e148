"""The picture of an engine's flows, and the metrics that a line has room for."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from rlhf_flows.graph import ControlDependencies, trace
from rlhf_flows.modules import BaseModule
from rlhf_flows.reporting.flow_picture import draw_flows
from rlhf_flows.reporting.headline import headline


def test_every_call_is_a_box_and_every_input_an_arrow_also_with_names_that_svg_must_escape() -> (
    None
):
    policy, reward, trainer = BaseModule("policy"), BaseModule("re<ward"), BaseModule("trainer")

    def env_flow(batch: Any) -> Any:
        sampled = policy.forward_step(batch)
        return reward.forward_step(sampled, batch), sampled

    def trainer_flow(batch: Any) -> None:
        first = trainer.train_step(batch)  # type: ignore[call-arg]
        with ControlDependencies(first):
            policy.train_step(batch)  # type: ignore[call-arg]

    graphs = {"environment": trace(env_flow), "trainer": trace(trainer_flow)}
    svg = draw_flows(graphs, [("trainer", "policy")])
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.iter(f"{space}text")]
    assert {"policy.forward_step", "re<ward.forward_step", "returned", "weights: "} <= set(texts)
    arrows = [p for p in root.iter(f"{space}path") if p.get("marker-end")]
    assert len(arrows) == 3 + 2 + 2 + 1  # inputs, returned; inputs, waiting
    assert sum(p.get("stroke-dasharray") is not None for p in arrows) == 1
    boxes = [(b.get("x"), b.get("y")) for b in root.iter(f"{space}rect") if b.get("rx")]
    assert len(boxes) == len(set(boxes)) == 4 + 3


def test_a_headline_shows_what_is_wanted_of_every_module_then_losses_then_whatever_there_is() -> (
    None
):
    wanted = ("reward", "loss", "kl")
    assert headline(["kl", "tokens", "reward"], wanted) == ["reward", "kl"]
    two = ["a/value_loss", "a/rows", "b/kl", "a/loss"]
    assert headline(two, wanted) == ["a/loss", "b/kl", "a/value_loss"]
    assert headline(["ups", "rows", "seconds", "forward_seconds"], wanted) == ["ups"]
    same = ["policy/reward", "value/reward", "policy/kl", "value/kl"]
    assert headline(same, ["reward", "kl"]) == ["policy/reward", "policy/kl", "value/kl"]
