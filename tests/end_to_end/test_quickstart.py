"""The quickstart on real parts, killed and started again: the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

# Four starts of vLLM and of services of their own: minutes on two cores.
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

SMALL = (
    "warmup_steps=20",
    "num_eval_prompts=64",
    "runtime.num_episode=4",
    "runtime.sample_per_episode=128",
    "runtime.generation_batch_size=32",
    "runtime.train_global_batch_size=64",
    "runtime.eval_episode_interval=2",
)
TIMEOUT_S = 400


def start(folder: Path, run: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rlhf_flows.cli", "train", "quickstart", f"run_name={run}"]
    environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
    return subprocess.Popen(
        [*command, *SMALL, "--json", str(folder / f"{run}.json")], cwd=folder, env=environment
    )


def commits(folder: Path, run: str) -> list[str]:
    paths = sorted((folder / "runs" / run / "episodes").glob("*/trained.json"))
    payloads: list[Any] = [json.loads(path.read_text()) for path in paths]
    return [payload["checkpoints"]["trainer"]["digest"] for payload in payloads]


def shards(folder: Path, run: str) -> dict[str, bytes]:
    base = folder / "runs" / run / "episodes"
    return {str(p.relative_to(base)): p.read_bytes() for p in sorted(base.rglob("*.parquet"))}


def test_a_killed_quickstart_ends_with_the_same_samples_and_weights(tmp_path: Path) -> None:
    assert start(tmp_path, "undisturbed").wait(TIMEOUT_S) == 0
    victim = start(tmp_path, "killed")
    deadline = time.monotonic() + TIMEOUT_S
    # In the middle of an episode: some of its shards are there, and it is not trained.
    watched = tmp_path / "runs/killed/episodes/episode=000001/rollout/shard-00001.parquet"
    while not watched.exists():
        assert time.monotonic() < deadline
        assert victim.poll() is None
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert len(commits(tmp_path, "killed")) < 4
    before = shards(tmp_path, "killed")
    times = {name: (tmp_path / "runs/killed/episodes" / name).stat().st_mtime_ns for name in before}
    assert start(tmp_path, "killed").wait(TIMEOUT_S) == 0
    assert commits(tmp_path, "killed") == commits(tmp_path, "undisturbed")
    assert shards(tmp_path, "killed") == shards(tmp_path, "undisturbed")
    for name, written in times.items():
        assert (tmp_path / "runs/killed/episodes" / name).stat().st_mtime_ns == written
    summary = json.loads((tmp_path / "killed.json").read_text())
    assert summary["resumed_at"] >= 1
    assert set(summary["metrics"]["after"]) >= {"reward", "exact"}


@pytest.mark.parametrize(
    "trainer",
    [(), ("trainer.backend=megatron", "trainer.tensor_parallel=2")],
    ids=["torch", "two ranks of Megatron"],
)
def test_the_whole_quickstart_learns_to_sort(trainer: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf_flows.cli", "train", "quickstart", *trainer]
    environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
    summary = tmp_path / "summary.json"
    done = subprocess.run(
        [*command, "--json", str(summary)], cwd=tmp_path, env=environment, timeout=800, check=False
    )
    assert done.returncode == 0
    metrics = json.loads(summary.read_text())["metrics"]
    assert metrics["before"]["exact"] < 0.5
    assert metrics["after"]["exact"] > 0.9
