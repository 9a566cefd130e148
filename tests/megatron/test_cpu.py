"""The shim is there while a call lasts, in that call's thread, and on CPU alone."""

from __future__ import annotations

import threading

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.tensor_parallel import random as megatron_random

from rlhf_flows.modules.megatron.cpu import calling_megatron


def patched() -> list[object]:
    return [
        torch.cuda.current_device,
        torch.cuda.synchronize,
        megatron_random._get_cuda_rng_state,
        megatron_random._set_cuda_rng_state,
        megatron_random._CUDA_RNG_STATE_TRACKER,
        megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED,
    ]


def test_names_of_cuda_mean_the_cpu_while_a_call_lasts() -> None:
    with calling_megatron("cpu"):
        made = torch.zeros(2, device="cuda")
        assert made.device.type == "cpu"
        assert made.cuda() is made
        assert made.type() == "torch.cuda.FloatTensor"
        assert torch.cuda.current_device() == torch.device("cpu")
        torch.cuda.synchronize()
    assert made.type() == "torch.FloatTensor"


def test_everything_is_put_back_when_the_last_call_ends() -> None:
    before = patched()
    outer = calling_megatron("cpu")
    with outer:
        with calling_megatron("cpu"):
            pass
        assert all(now is not then for now, then in zip(patched(), before, strict=True))
    assert patched() == before
    with pytest.raises(ValueError, match="inside"), calling_megatron("cpu"):
        raise ValueError("inside")
    assert patched() == before


def test_nothing_changes_on_cuda() -> None:
    before = patched()
    with calling_megatron("cuda:0"):
        assert patched() == before


def test_another_thread_needs_a_call_of_its_own() -> None:
    found: list[str] = []

    def work() -> None:
        found.append(torch.zeros(1).type())
        with calling_megatron("cpu"):
            found.append(torch.zeros(1).type())

    with calling_megatron("cpu"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == ["torch.FloatTensor", "torch.cuda.FloatTensor"]


def test_a_fork_of_the_generators_draws_from_its_own_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with calling_megatron("cpu"):
        tracker = megatron_random.get_cuda_rng_tracker()
        tracker.add("mine", 11)
        with tracker.fork("mine"):
            first = torch.rand(2)
        with tracker.fork("mine"):
            assert not torch.equal(torch.rand(2), first)
    assert torch.equal(torch.rand(2), expected)
