"""Moving averages of weights: the formula, and that a trainer's worker carries them to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_flows.errors import ConfigError
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.models.reference import Reference
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.pools.averages import WeightAverages
from rlhf_flows.pools.digest import digest_weights
from rlhf_flows.pools.messages import CheckpointRecord
from rlhf_flows.pools.worker import Worker
from rlhf_flows.settings import OptimizerSettings
from tests.models.test_policy_trainer import episode
from tests.pools.specs import spec_of
from tests.pools.test_worker import train_episode
from tests.toys import ToyTrainer


def draws(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [
        {"a": torch.randn(3, 4, generator=g).to(dtype), "b": torch.randn(5, generator=g).to(dtype)}
        for _ in range(count)
    ]


@pytest.mark.parametrize("eta", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
def test_the_average_is_the_sum_written_out(eta: float) -> None:
    versions = draws(6)
    averages = WeightAverages({"reference": eta}, versions[0].items())
    for version in versions[1:]:
        averages.update(version.items())
    for name, got in averages.weights("reference", versions[0].items()):
        expected = (1 - eta) ** 5 * versions[0][name].double()
        for i, version in enumerate(versions[1:]):
            expected += eta * (1 - eta) ** (4 - i) * version[name].double()
        torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)
        if eta == 1.0:
            assert torch.equal(got, versions[-1][name])
        if eta == 0.0:
            assert torch.equal(got, versions[0][name])


def test_a_small_eta_moves_bfloat16_weights_too() -> None:
    first, last = draws(2, torch.bfloat16)
    averages = WeightAverages({"reference": 1e-3}, first.items())
    for _ in range(500):
        averages.update(last.items())
    left = 0.999**500
    for name, got in averages.weights("reference", first.items()):
        assert got.dtype == torch.bfloat16
        expected = left * first[name].double() + (1 - left) * last[name].double()
        torch.testing.assert_close(got.double(), expected, atol=1e-2, rtol=1e-2)


def test_followers_of_one_trainer_each_have_their_own() -> None:
    first, last = draws(2)
    averages = WeightAverages({"near": 1.0, "far": 0.0}, first.items())
    averages.update(last.items())
    assert torch.equal(dict(averages.weights("near", first.items()))["a"], last["a"])
    assert torch.equal(dict(averages.weights("far", first.items()))["a"], first["a"])
    averages.update([(name, tensor + 1) for name, tensor in last.items()])
    assert torch.equal(dict(averages.weights("near", first.items()))["a"], last["a"] + 1)


# ---- in a worker ------------------------------------------------------------------------------


def worker_of(store: Path, module: Any = None, *, eta: float = 0.25) -> Worker:
    spec = spec_of(module or ToyTrainer("trainer"), store, averages={"reference": eta})
    worker = Worker(spec)
    worker.setup(1)
    return worker


def trained(worker: Worker, number: int) -> CheckpointRecord:
    train_episode(worker, number)
    record = worker.checkpoint(1, number + 1, True)
    worker.committed(1, number + 1)
    return record


def preferences(worker: Worker) -> Tensor:
    return worker._module.model.preferences.detach().clone()  # type: ignore[attr-defined]


def stored(store: Path, record: CheckpointRecord) -> Tensor:
    folder = record.averages["reference"].weights
    assert folder is not None
    return load_file(store / folder.prefix / "model.safetensors")["preferences"]


def test_an_episode_is_one_step_of_the_average_which_its_checkpoint_holds(tmp_path: Path) -> None:
    worker, average = worker_of(tmp_path), torch.zeros(10)
    for number in range(3):
        record = trained(worker, number)
        average = 0.25 * preferences(worker) + 0.75 * average  # once, of two optimizer steps
        torch.testing.assert_close(stored(tmp_path, record), average, atol=1e-6, rtol=1e-6)
        again = CheckpointRecord.from_json(record.to_json())
        assert again.to_json() == record.to_json()
        assert len(again.weights_folders) == 2
        own = digest_weights([("preferences", stored(tmp_path, record))])
        assert worker.weights_digests(1)["reference"] == record.digests["reference"] == own
    assert not torch.equal(average, preferences(worker))


@pytest.mark.parametrize(("eta", "is_like"), [(1.0, "the policy"), (0.0, "the start")])
def test_at_its_ends_it_is_the_policy_or_the_start(
    tmp_path: Path, eta: float, is_like: str
) -> None:
    worker = worker_of(tmp_path, eta=eta)
    for number in range(2):
        record = trained(worker, number)
        expected = preferences(worker) if is_like == "the policy" else torch.zeros(10)
        assert torch.equal(stored(tmp_path, record), expected)
        if eta == 1.0:
            assert record.digests["reference"] == record.digest


def test_a_restored_worker_averages_on_to_the_bit(tmp_path: Path) -> None:
    first = worker_of(tmp_path)
    record = trained(first, 0)
    expected = [trained(first, number).digests for number in (1, 2)]
    second = worker_of(tmp_path / "other")
    second._store, second._weights._folders._store = first._store, first._store
    trained(second, 0)
    train_episode(second, 1)  # and was killed before the commit
    second.restore(1, record, 1)
    assert second.weights_digests(1) == record.digests
    assert [trained(second, number).digests for number in (1, 2)] == expected


def test_a_follower_takes_the_average_from_the_store(tmp_path: Path) -> None:
    worker = worker_of(tmp_path)
    record = [trained(worker, number) for number in range(2)][-1]
    follower = Worker(spec_of(ToyTrainer("reference"), tmp_path))
    follower.setup(1)
    state = follower.restore(1, record.averages["reference"], 2)
    assert (state.version, state.clean) == (2, True)
    assert torch.equal(preferences(follower), stored(tmp_path, record))


def test_a_state_without_the_average_is_refused(tmp_path: Path) -> None:
    plain = Worker(spec_of(ToyTrainer("trainer"), tmp_path))
    plain.setup(1)
    record = trained(plain, 0)
    assert record.averages == {}
    assert "averages" not in record.to_json()
    with pytest.raises(ConfigError, match="no average of these weights for 'reference'"):
        worker_of(tmp_path).restore(1, record, 1)


def test_masters_are_what_is_averaged_and_the_folder_is_one_that_others_load(
    tmp_path: Path,
) -> None:
    model = build_tiny_qwen2(tmp_path / "model", hidden_size=64, num_layers=2)
    optimizer = OptimizerSettings(learning_rate=1e-3, master_weights=True)
    module = PolicyTrainer(path=model, dtype="bfloat16", optimizer=optimizer)
    worker = worker_of(tmp_path / "store", module, eta=0.5)
    made: Any = worker._module
    start = {name: tensor.clone() for name, tensor in made.master_weights.items()}
    made.train_step(made.micro_batches(made.prepare_batch(episode())), 0)
    worker._averages.update(made.trained_weights())
    record = worker.checkpoint(1, 1, False)
    folder = record.averages["reference"].weights
    assert folder is not None
    path = tmp_path / "store" / folder.prefix
    theirs = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
    for name, master in made.master_weights.items():
        mean = (0.5 * (start[name] + master)).to(torch.bfloat16)
        torch.testing.assert_close(theirs[name].bfloat16(), mean, atol=1e-6, rtol=1e-2)
    # A reference of any precision takes it, in the place of its own.
    reference = Reference(path=path)
    reference.validate()
    reference.setup()
    other = Reference(path=model)
    other.attach(ModuleContext())
    other.setup()
    other.load_weights(load_file(path / "model.safetensors").items())
    for (name, a), (_, b) in zip(reference.named_weights(), other.named_weights(), strict=True):
        assert torch.equal(a, b), name
    assert dataclasses.replace(record, averages={}).weights_folders == [record.weights]
