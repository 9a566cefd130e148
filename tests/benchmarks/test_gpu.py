"""The benchmark of one GPU runs here on toy sizes, so that it is whole when there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.arithmetic import dense_peak, forward_flops, parameters_of, training_flops
from benchmarks.decoders import SIZES
from benchmarks.gpu.table import table_of
from benchmarks.learners import batch_of, mixed_texts

ROOT = Path(__file__).parents[2]


def run(folder: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    rows = (folder / "results.jsonl").read_text().splitlines()
    return done.returncode, [json.loads(row) for row in rows]


@pytest.mark.long
def test_the_rehearsal_runs_every_section_and_its_trainers_agree(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    code, rows = run(tmp_path, "--cpu-rehearsal")
    assert code == 0, rows
    assert not [row for row in rows if "failed" in row]
    assert {row["section"] for row in rows} == {
        "machine",
        "agreement",
        "attention",
        "torch toy",
        "megatron toy",
    }
    for by in ("torch", "megatron"):
        found = {row["what"] for row in rows if row["section"] == f"{by} toy"}
        assert found == {"matmul", "build", "train", "logprobs", "export"}
    assert "| megatron | toy | train |" in (tmp_path / "results.md").read_text()


def test_a_section_that_cannot_run_is_told_of_and_ends_no_other(tmp_path: Path) -> None:
    """There is no CUDA here, so each of them fails."""
    code, rows = run(tmp_path, "--only", "torch 7B,machine", "--budget-s", "60")
    assert code == 1
    assert [row["section"] for row in rows] == ["machine", "torch 7B"]
    assert all(row["failed_section"] for row in rows)
    assert "**torch 7B failed**" in (tmp_path / "results.md").read_text()


def test_parameters_of_the_real_sizes_are_those_of_their_names() -> None:
    found = {name: round(parameters_of(shape) / 1e6) for name, shape in SIZES.items()}
    assert found == {"toy": 0, "25M": 26, "150M": 149, "1.5B": 1544, "7B": 7615}


def test_flops_are_six_a_parameter_and_token_and_attention_of_what_is_seen() -> None:
    shape = SIZES["toy"]
    head = shape.vocabulary_size * shape.width
    body = parameters_of(shape) - head
    # A prompt of two tokens, a response of three: four are computed, three are scored.
    pairs = 4 * 5 / 2
    attention = 12 * shape.num_layers * shape.num_heads * shape.head_width * pairs
    assert training_flops(shape, [(2, 3)]) == 6 * (4 * body + 3 * head) + attention
    alone, shared = (forward_flops(shape, [(2, 3)] * 2, siblings=n) for n in (1, 2))
    assert alone - shared == forward_flops(shape, [(2, 1)]) - 2 * head


def test_mixed_texts_have_the_tokens_that_are_asked_for() -> None:
    texts = mixed_texts(10_000, longest=500)
    assert 9_990 <= sum(p + r for p, r in texts) <= 10_000
    lengths = sorted(p + r for p, r in texts)
    assert lengths[-1] <= 500
    assert min(min(text) for text in texts) >= 1
    batch = batch_of(texts, vocabulary_size=50)
    assert [(len(p), len(r)) for p, r in zip(*batch.values(), strict=True)] == texts


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H200", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312)],
)
def test_the_peak_of_a_device_is_that_of_its_kind(name: str, tflops: float) -> None:
    assert dense_peak(name) == tflops * 1e12
    assert dense_peak("Radeon") is None


def test_a_table_shows_what_there_is_and_says_what_is_not() -> None:
    rows = [
        {"section": "torch 7B", "by": "torch", "what": "train", "mfu": 0.5},
        {"section": "megatron 7B", "failed_section": "ended after 75 s"},
    ]
    text = table_of(rows)
    assert "| by | what | mfu |" in text
    assert "| torch | train | 0.5 |" in text
    assert "**megatron 7B failed**: ended after 75 s" in text
