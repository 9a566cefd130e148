"""What megatron-core 0.16.1 needs to run on CPU with gloo, and nothing of it on CUDA.

Megatron names CUDA in places that no setting reaches: devices given as literals, the current
device, the type that a tensor reports, the states of its random generators. The decision here: all
of that is mended for the time of a call and by nothing else, so a process that never calls Megatron
on CPU, or calls it on CUDA, runs unpatched torch; what was changed is put back when the last call
in the process ends. Enter it around each call: a part of it belongs to the thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

__all__ = ["calling_megatron"]

_CUDA_TYPES = {
    f"torch.{kind}Tensor": f"torch.cuda.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")
}


def calling_megatron(device: str) -> AbstractContextManager[None]:
    """Around each call of Megatron, in the thread that calls it; does nothing unless on "cpu"."""
    return _on_cpu() if torch.device(device).type == "cpu" else nullcontext()


@contextmanager
def _on_cpu() -> Iterator[None]:
    _patches.enter()
    try:
        with _CudaNamesMeanCpu():
            yield
    finally:
        _patches.leave()


class _CudaNamesMeanCpu(TorchFunctionMode):
    """device="cuda" makes tensors on the CPU, `.cuda()` leaves them there, and `.type()` of one
    reports the name that Megatron's optimizers assert. Holds in the thread that entered it.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return _CUDA_TYPES.get(result, result)
        return result


class _Patches:
    """Attributes of modules, replaced while at least one call is under way in the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_calls = 0
        self._originals: list[tuple[Any, str, Any]] = []
        self._tracker: Any = None

    def enter(self) -> None:
        with self._lock:
            self._num_calls += 1
            if self._num_calls > 1:
                return
            if self._tracker is None:
                self._tracker = _CpuGenerators()
            for owner, name, value in self._replacements():
                self._originals.append((owner, name, getattr(owner, name)))
                setattr(owner, name, value)

    def leave(self) -> None:
        with self._lock:
            self._num_calls -= 1
            if self._num_calls == 0:
                while self._originals:
                    setattr(*self._originals.pop())

    def _replacements(self) -> list[tuple[Any, str, Any]]:
        cpu = torch.device("cpu")
        nothing: Callable[..., None] = lambda *args, **kwargs: None  # noqa: E731
        return [
            (torch.cuda, "current_device", lambda: cpu),
            (torch.cuda, "synchronize", nothing),
            (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.empty(0)),
            (megatron_random, "_set_cuda_rng_state", nothing),
            (megatron_random, "_CUDA_RNG_STATE_TRACKER", self._tracker),
            (megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True),
        ]


class _CpuGenerators(megatron_random.CudaRNGStatesTracker):  # type: ignore[misc]  # has no types
    """Megatron's named generator states, kept of the CPU's generator.

    A name that was never added forks the plain generator: models here have no dropout, so no state
    of it decides anything, and Megatron forks even where nothing is drawn.
    """

    def add(self, name: str, seed: int) -> None:
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        before = torch.get_rng_state()
        torch.set_rng_state(self.states_.get(name, before))
        try:
            yield
        finally:
            if name in self.states_:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(before)


_patches = _Patches()
