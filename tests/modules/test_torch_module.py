from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_flows.errors import ConfigError, NonFiniteError, SyncError
from rlhf_flows.modules.torch_module import TorchModule, kind_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale


class Regression(TorchModule):
    def __init__(self, name: str = "net", *, optimizer: str = "adam") -> None:
        super().__init__(name)
        self.kind = optimizer

    def setup(self) -> None:
        torch.manual_seed(0)
        self.model = Net()
        if self.kind == "adam":
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, amsgrad=True)
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.lr_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.7)

    def step(self) -> float:
        noise = torch.rand(2, 4) * random.random() * float(np.random.rand())
        loss = self.model(noise).square().mean()
        self.model.zero_grad()
        loss.backward()
        self.clip_gradients(float(loss.detach()), 1.0)
        self.optimizer.step()
        self.lr_scheduler.step()
        return float(loss.detach())


def made(**options: Any) -> Regression:
    module = Regression(**options)
    module.setup()
    return module


def copies(module: TorchModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.named_weights()}


def test_tied_weights_are_named_once_and_buffers_are_weights() -> None:
    names = [name for name, _ in made().named_weights()]
    assert names == ["scale", "first.weight", "first.bias", "second.bias"]


def test_weights_loaded_are_the_weights_given() -> None:
    module = made()
    given = {name: torch.randn_like(tensor) for name, tensor in module.named_weights()}
    module.load_weights(reversed(given.items()))
    for name, tensor in module.named_weights():
        assert torch.equal(tensor, given[name])
    assert torch.equal(module.model.second.weight, given["first.weight"])


def received(module: TorchModule, given: dict[str, Tensor]) -> None:
    """One at a time, each in memory that is gone after it."""
    kinds = [kind_of(name, tensor) for name, tensor in given.items()]
    with module.receiving_weights(kinds) as take:
        for name, tensor in given.items():
            lent = tensor.clone()
            take([(name, lent)])
            lent.zero_()


def test_weights_that_come_one_by_one_are_the_weights_given() -> None:
    module = made()
    given = {name: torch.randn_like(tensor) for name, tensor in module.named_weights()}
    received(module, given)
    for name, tensor in module.named_weights():
        assert torch.equal(tensor, given[name])


def test_weights_that_are_to_come_are_checked_before_the_first_does() -> None:
    module = made()
    before = copies(module)
    with pytest.raises(SyncError, match="scale is missing"):
        received(module, {n: t + 1 for n, t in before.items() if n != "scale"})
    for name, tensor in module.named_weights():
        assert torch.equal(tensor, before[name])


def test_a_load_of_ones_own_gets_all_weights_at_once() -> None:
    class Doubling(Regression):
        def load_weights(self, weights: Any) -> None:
            super().load_weights([(name, 2 * tensor) for name, tensor in weights])

    module = Doubling()
    module.setup()
    given = {name: torch.randn_like(tensor) for name, tensor in module.named_weights()}
    received(module, given)
    for name, tensor in module.named_weights():
        assert torch.equal(tensor, 2 * given[name])


def test_weights_that_do_not_fit_are_all_named_and_change_nothing() -> None:
    module = made()
    before = copies(module)
    given = {name: tensor + 1 for name, tensor in before.items()}
    del given["first.bias"]
    given["third.bias"] = torch.zeros(4)
    given["second.bias"] = torch.zeros(5)
    given["first.weight"] = given["first.weight"].to(torch.bfloat16)
    pairs = [*given.items(), ("scale", before["scale"])]
    with pytest.raises(SyncError) as caught:
        module.load_weights(pairs)
    message = str(caught.value)
    for part in (
        "'net'",
        "first.bias is missing",
        "third.bias is not in the model",
        "second.bias is float32 [5], expected float32 [4]",
        "first.weight is bfloat16 [4, 4], expected float32 [4, 4]",
        "scale came twice",
        "Nothing was changed",
    ):
        assert part in message
    for name, tensor in module.named_weights():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_training_goes_on_from_a_saved_state_to_the_bit(tmp_path: Path, optimizer: str) -> None:
    first = made(optimizer=optimizer)
    for _ in range(3):
        first.step()
    first.save_state(tmp_path)
    saved = copies(first)
    expected = [first.step() for _ in range(4)]

    second = made(optimizer=optimizer)
    second.load_weights(saved.items())
    second.load_state(tmp_path)
    assert [second.step() for _ in range(4)] == expected
    for name, tensor in second.named_weights():
        assert torch.equal(tensor, dict(first.named_weights())[name])
    assert second.lr_scheduler.state_dict() == first.lr_scheduler.state_dict()


def test_a_state_holds_no_pickle(tmp_path: Path) -> None:
    module = made()
    module.step()
    module.save_state(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["state.json", "state.safetensors"]
    kept = module.optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(load_file(tmp_path / "state.safetensors")["optimizer/0/exp_avg"], kept)


def test_a_state_before_the_first_step_can_be_saved(tmp_path: Path) -> None:
    first, second = made(), made()
    first.save_state(tmp_path)
    second.load_state(tmp_path)
    torch.manual_seed(5)
    assert second.optimizer.state_dict()["state"] == {}


def test_a_folder_without_a_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no training state"):
        made().load_state(tmp_path)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    module = made()
    module.save_state(tmp_path)
    other = made()
    other.optimizer = torch.optim.AdamW(list(other.model.parameters())[:1])
    with pytest.raises(
        ConfigError, match=r"of \[3\] parameters per group, this optimizer has \[1\]"
    ):
        other.load_state(tmp_path)
    other.optimizer = None
    with pytest.raises(ConfigError, match="the state has an optimizer and the module"):
        other.load_state(tmp_path)


def test_a_state_that_only_pickle_could_hold_is_refused(tmp_path: Path) -> None:
    module = made()
    module.lr_scheduler.odd = object()
    with pytest.raises(ConfigError, match="lr_scheduler/odd is a object, which cannot be saved"):
        module.save_state(tmp_path)


def test_gradients_are_clipped_to_the_global_norm() -> None:
    module = made()
    for p in module.model.parameters():
        p.grad = torch.ones_like(p)
    assert module.clip_gradients(0.0, 2.0) == pytest.approx(24**0.5)
    norm = torch.cat([p.grad.flatten() for p in module.model.parameters()]).norm()
    assert float(norm) == pytest.approx(2.0, rel=1e-5)
    assert module.clip_gradients(0.0, None) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize(("loss", "gradient"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_what_is_not_finite_is_named_and_its_gradients_dropped(
    loss: float, gradient: float
) -> None:
    module = made()
    for p in module.model.parameters():
        p.grad = torch.full_like(p, gradient)
    with pytest.raises(NonFiniteError, match="module 'net' met a loss of"):
        module.clip_gradients(loss, 1.0)
    assert all(p.grad is None for p in module.model.parameters())


def test_a_module_without_a_model_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"nothing as self\.model.*Regression\.setup"):
        Regression().load_weights([])


def test_a_plain_torch_model_is_saved_as_safetensors(tmp_path: Path) -> None:
    module = made()
    module.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {n: t.tolist() for n, t in saved.items()} == {
        n: t.tolist() for n, t in module.named_weights()
    }


RANK = """
import sys, torch
from torch import nn
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.modules.torch_module import TorchModule
rank, file = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
module = TorchModule("net")
module.attach(ModuleContext(rank=rank, world_size=2))
module.model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1).to(torch.bfloat16)])
if rank == 0:  # the other's share of the batch was empty
    for p in module.model.parameters():
        p.grad = torch.full_like(p, 1.5)
scalars = module.sum_gradients(torch.tensor([1.0 + rank, 10.0], dtype=torch.float64))
assert scalars.tolist() == [3.0, 20.0], scalars
for p in module.model.parameters():
    assert p.grad.dtype == p.dtype and (p.grad == 1.5).all(), p.grad
torch.distributed.destroy_process_group()
"""


def test_gradients_of_ranks_are_summed_also_where_one_had_no_work(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meet")],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
