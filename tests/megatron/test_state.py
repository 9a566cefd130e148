"""Training goes on from a saved state as if it had not ended, on whatever ranks it is taken up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_flows.modules.megatron.topology import Topology
from tests.megatron.ranks import Ranks

CHECKS = "tests.megatron.state_checks"
LOSS, WEIGHTS = 2e-6, 2e-5
"""Largest differences between topologies; a step moves weights by about 1e-3."""

SHARED = {"distributed_optimizer": True}
TOPOLOGIES: dict[str, tuple[Topology, dict[str, Any]]] = {
    "one rank": (Topology(), {}),
    "TP2": (Topology(world_size=2, tensor_parallel=2), {}),
    "PP2": (Topology(world_size=2, pipeline_parallel=2), {}),
    "PP2, VPP2": (Topology(world_size=2, pipeline_parallel=2, virtual_pipeline=2), {}),
    "DP2": (Topology(world_size=2), {}),
    "DP2, shared": (Topology(world_size=2), SHARED),
    "TP2 x PP2": (Topology(world_size=4, tensor_parallel=2, pipeline_parallel=2), {}),
    "TP2 x DP2, shared": (Topology(world_size=4, tensor_parallel=2), SHARED),
}

Saved = Callable[[str, str], tuple[Path, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def saved(
    ranks: Ranks, decoder_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Saved:
    """The folder that a topology saved after two steps, and what it did in the third."""
    made: dict[tuple[str, str], tuple[Path, list[dict[str, Any]]]] = {}

    def save(name: str, dtype: str = "float32") -> tuple[Path, list[dict[str, Any]]]:
        if (name, dtype) not in made:
            topology, options = TOPOLOGIES[name]
            out = tmp_path_factory.mktemp("saved")
            found = ranks.run(
                f"{CHECKS}:train_and_save",
                world_size=topology.world_size,
                folder=str(decoder_folder("qwen2, tied")),
                topology=topology,
                out=str(out),
                max_file_bytes=20_000,
                dtype=dtype,
                **options,
            )
            made[name, dtype] = out, found
        return made[name, dtype]

    return save


def resumed(
    ranks: Ranks, model: Path, at: str, out: Path, again: Path, **load: Any
) -> list[dict[str, Any]]:
    topology, options = TOPOLOGIES[at]
    return ranks.run(  # type: ignore[no-any-return]
        f"{CHECKS}:load_and_go_on",
        world_size=topology.world_size,
        folder=str(model),
        topology=topology,
        out=str(out),
        again=str(again),
        **options,
        **load,
    )


def merged_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight's state, whole, by NAME/KIND, put together by the index alone."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    axes: dict[str, int] = {}
    shapes: dict[str, list[int]] = {}
    for index in sorted(folder.glob("state-*.json")):
        for piece in json.loads(index.read_text())["pieces"]:
            where, tensors = piece["slice"], load_file(folder / piece["file"])
            for key, tensor in tensors.items():
                if key.rpartition("/")[0] == where["name"]:
                    pieces.setdefault(key, []).append((where["start"], tensor))
                    axes[key], shapes[key] = where["axis"] or 0, where["shape"]
            pieces.setdefault(f"{where['name']}/step", []).append(
                (where["start"], torch.tensor([piece["step"]]))
            )
    whole = {}
    for key, found in pieces.items():
        ordered = [tensor for _, tensor in sorted(found, key=lambda entry: entry[0])]
        if key.endswith("/step"):
            (whole[key],) = {int(step) for step in ordered} and [ordered[0]]
            assert len({int(step) for step in ordered}) == 1
        else:
            whole[key] = torch.cat(ordered, axes[key])
            assert list(whole[key].shape) == shapes[key]
    return whole


def equal_states(one: Path, other: Path) -> None:
    first, second = merged_state(one), merged_state(other)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_same_ranks_go_on_to_the_bit(
    name: str,
    dtype: str,
    ranks: Ranks,
    saved: Saved,
    decoder_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    out, expected = saved(name, dtype)
    found = resumed(ranks, decoder_folder("qwen2, tied"), name, out, tmp_path, dtype=dtype)
    for rank, uninterrupted in zip(found, expected, strict=True):
        assert rank["weights"] == 0.0
        assert rank["log"] == uninterrupted["log"]
        assert rank["drawn"] == uninterrupted["drawn"]
        assert rank["beta"] == [0.25, 3.0]
        assert rank["steps"] == [3.0]
        assert not rank["counters_shared"]
    equal_states(out / "state", tmp_path / "state")


CHANGES = [
    ("TP2", "PP2"),
    ("PP2", "TP2"),
    ("DP2, shared", "TP2 x PP2"),
    ("TP2 x PP2", "DP2, shared"),
    ("TP2 x DP2, shared", "one rank"),
    ("one rank", "TP2 x DP2, shared"),
    ("PP2, VPP2", "DP2"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_other_ranks_take_every_number_and_go_on_alike(
    before: str,
    after: str,
    dtype: str,
    ranks: Ranks,
    saved: Saved,
    decoder_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    out, expected = saved(before, dtype)
    found = resumed(ranks, decoder_folder("qwen2, tied"), after, out, tmp_path, dtype=dtype)
    equal_states(out / "state", tmp_path / "state")
    for rank in found:
        loss = expected[0]["log"][0]["loss"]
        assert rank["steps"] == [3.0]
        if dtype == "float32":
            assert rank["log"][0]["loss"] == pytest.approx(loss, abs=LOSS)
            assert rank["weights"] < WEIGHTS
        else:
            assert rank["log"][0]["loss"] == pytest.approx(loss, rel=0.02)
            assert rank["weights"] < 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["PP2, VPP2", "TP2 x PP2", "TP2 x DP2, shared"])
def test_weights_come_out_in_the_precision_they_are_trained_in(
    name: str, dtype: str, saved: Saved
) -> None:
    out, _ = saved(name, dtype)
    trained = load_file(out / "trained.safetensors")
    weights = load_file(out / "weights" / "model.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {f"torch.{dtype}"}
    assert trained.keys() == weights.keys()
    state = merged_state(out / "state")
    for key, tensor in trained.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.to(weights[key].dtype), weights[key])
        if dtype == "bfloat16":
            assert torch.equal(tensor, state[f"{key}/master"])
            assert not torch.equal(tensor, weights[key].float())


@pytest.mark.parametrize(
    ("dtype", "loss", "weights"), [("float32", LOSS, WEIGHTS), ("bfloat16", 0.1, 0.01)]
)
def test_the_torch_trainer_goes_on_from_what_megatron_saved(
    dtype: str, loss: float, weights: float, ranks: Ranks, saved: Saved
) -> None:
    out, uninterrupted = saved("TP2 x DP2, shared", dtype)
    (found,) = ranks.run(f"{CHECKS}:torch_goes_on", out=str(out), dtype=dtype)
    expected = uninterrupted[0]["log"][0]
    assert found["loss"] == pytest.approx(expected["loss"], abs=loss)
    assert found["learning_rate"] == expected["learning_rate"]
    assert found["weights"] < weights


def test_every_rank_writes_about_as_much_and_nothing_twice(saved: Saved) -> None:
    out, _ = saved("TP2 x DP2, shared", "float32")
    sizes, names = [], []
    for index in sorted((out / "state").glob("state-*.json")):
        pieces = json.loads(index.read_text())["pieces"]
        names += [(p["slice"]["name"], p["slice"]["start"]) for p in pieces]
        sizes.append(sum((out / "state" / f).stat().st_size for f in {p["file"] for p in pieces}))
    assert len(names) == len(set(names))
    assert len(sizes) == 4
    assert max(sizes) < 1.4 * min(sizes)


def test_a_rank_reads_the_files_that_hold_its_part(
    ranks: Ranks, saved: Saved, decoder_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    out, _ = saved("PP2", "float32")
    first, last = resumed(ranks, decoder_folder("qwen2, tied"), "PP2", out, tmp_path)
    # Of a pipeline's stages each needs its own, but for the embedding, which both have.
    assert all(name.startswith(("state-00000", "random-00000", "extra")) for name in first["read"])
    assert len([n for n in last["read"] if n.startswith("state-00000")]) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "bfloat16"}, "precision"),
        ({"extra": False}, "beside optimizer and schedule"),
        ({"variant": "qwen3"}, "another model"),
    ],
)
def test_state_of_another_model_or_setting_is_refused_and_nothing_changes(
    change: dict[str, Any],
    says: str,
    ranks: Ranks,
    saved: Saved,
    decoder_folder: Callable[[str], Path],
) -> None:
    out, _ = saved("TP2", "float32")
    options = {k: v for k, v in change.items() if k != "variant"}
    (found,) = ranks.run(
        f"{CHECKS}:refused_state",
        folder=str(decoder_folder(change.get("variant", "qwen2, tied"))),
        topology=Topology(),
        out=str(out),
        **options,
    )
    message, fresh = found
    assert says in message
    assert fresh
