from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_flows.generation import GenerationSettings
from rlhf_flows.models.samplers import policy_class
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.models.vllm_policy import VLLMPolicy

SERVER = Path(__file__).with_name("policy_server.py")
SAMPLERS = ["transformers", *(["vllm"] if VLLMPolicy.available() else [])]
MAX_MODEL_LEN = 64


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers whose next tokens are far from equally likely."""
    folder = build_tiny_qwen2(
        tmp_path_factory.mktemp("model"), hidden_size=64, num_layers=2, max_position_embeddings=64
    )
    model = load(folder)
    shake(model, seed=1)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def shake(model: Any, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture
def model(model_folder: Path) -> Any:
    return load(model_folder)


@pytest.fixture
def shaken() -> Callable[[Any], Any]:
    """Changes all weights of a model."""

    def change(model: Any) -> Any:
        shake(model, seed=2)
        return model

    return change


class RemotePolicy:
    """A policy in another process; its methods, by name."""

    def __init__(self, folder: Path, socket: Path, sampler: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        with Listener(str(socket)) as listener:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", str(SERVER), str(socket)], env=environment
            )
            self._connection = listener.accept()
        arguments = {
            "path": folder,
            "dtype": "float32",
            "max_model_len": MAX_MODEL_LEN,
            "generation": GenerationSettings(max_new_tokens=8, temperature=0.7, top_p=0.9),
            "eval_generation": GenerationSettings(max_new_tokens=4, temperature=0.0),
        }
        self._call("start", policy_class(sampler), arguments)  # type: ignore[arg-type]

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return partial(self._call, method)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self._connection.send((method, args, kwargs))
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self._connection.send(None)
        self._process.wait(timeout=60)
        self._connection.close()


@pytest.fixture(scope="session", params=SAMPLERS)
def started(
    request: pytest.FixtureRequest,
    model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RemotePolicy]:
    socket = tmp_path_factory.mktemp("socket") / "policy"
    remote = RemotePolicy(model_folder, socket, request.param)
    yield remote
    remote.close()


@pytest.fixture
def policy(started: RemotePolicy, model: Any) -> Iterator[RemotePolicy]:
    """A policy with the folder's weights, by each sampler that is installed."""
    yield started
    started.load_weights([(name, w.detach()) for name, w in model.named_parameters()])
