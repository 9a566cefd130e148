"""Whole runs of the toys, and what a finished run must show whatever happened on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_flows.engine import Engine
from rlhf_flows.engines import GRPOEngine
from rlhf_flows.flow import RunResult
from rlhf_flows.records.audit import audit_run
from rlhf_flows.store import open_store, scan
from tests.toys import ToyPolicy, ToyReference, ToyReward, ToyTrainer

if TYPE_CHECKING:
    import pandas as pd

RUNTIME: dict[str, Any] = {
    "num_episode": 3,
    "sample_per_episode": 32,
    "num_inference_per_prompt": 4,
    "generation_batch_size": 8,
    "train_global_batch_size": 16,
}
"""Four shards and two optimizer steps an episode."""
SHARDS, STEPS = 4, 2


def toy_engine(
    *,
    log: Path | None = None,
    rows: int = 64,
    eval_rows: int = 16,
    slow_s: float = 0.0,
    ends: Collection[str] = (),
    hangs: Collection[str] = (),
    reference_ema: float | None = None,
    **trainer: Any,
) -> GRPOEngine:
    engine = GRPOEngine(
        ToyPolicy("policy", log=log, slow_s=slow_s, ends=ends),
        ToyTrainer("trainer", **trainer),
        ToyReward("reward", hangs=hangs),
        None if reference_ema is None else ToyReference("reference"),
        name="toy",
        reference_ema=reference_ema,
    )
    engine.set_dataset([{"prompt": str(i)} for i in range(rows)])
    if eval_rows:
        engine.set_eval_dataset([{"prompt": f"eval {i}"} for i in range(eval_rows)])
    return engine


def learn(
    engine: Engine,
    store: Path | str,
    run: str,
    *,
    address: str | None = None,
    cluster: Mapping[str, Any] | None = None,
    models: Mapping[str, Any] | None = None,
    takeover: bool = False,
    progress: Any = None,
    **runtime: Any,
) -> RunResult:
    # The patience with a store comes on top of each timeout; a local folder needs none.
    patience_s = 60.0 if str(store).startswith("s3:") else 2.0
    return engine.learn(
        run_name=run,
        store={"url": str(store), "retry_budget_s": patience_s},
        cluster={"address": address, **(cluster or {})},
        models=dict(models or {}),
        runtime={**RUNTIME, **runtime},
        takeover=takeover,
        progress=progress,
    )


# ---- what lies in the store -------------------------------------------------------------------


def shard_digests(store: Path, run: str) -> dict[str, str]:
    """Key below the run -> digest of the file, of every shard of every phase."""
    root = store / run
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*.parquet"))
    }


def weight_digests(store: Path, run: str, module: str = "trainer") -> list[str]:
    """Of each policy version that was committed, in order."""
    return [c["checkpoints"][module]["digest"] for c in commits(store, run)]


def commits(store: Path, run: str) -> list[dict[str, Any]]:
    found = sorted((store / run / "episodes").glob("episode=*/trained.json"))
    return [json.loads(path.read_text()) for path in found]


def samples(store: Path, run: str, phase: str = "rollout") -> pd.DataFrame:
    """All samples of a phase, in the order of their ids."""
    import pandas as pd  # not for the many processes that only run

    paths = sorted((store / run / "episodes").glob(f"episode=*/{phase}/*.parquet"))
    frames = []
    for path in paths:
        frame = pd.read_parquet(path)
        frame["episode"] = int(path.parent.parent.name.removeprefix("episode="))
        frames.append(frame)
    return pd.concat(frames).sort_values("sample_id", ignore_index=True)


def evaluated_versions(store: Path | str, run: str) -> list[int]:
    state = scan(open_store(store), run)
    return [version for (version, _), found in state.evaluations.items() if found.done]


def assert_exactly_once(store: Path, run: str, *, episodes: int, staleness: int = 0) -> None:
    """The audit, and of a run that quarantined nothing: every planned sample sampled, scored and
    trained once, by the right version.
    """
    found = audit_run(open_store(store), run)
    assert found.ok, found.findings
    assert len(found.episodes) == episodes
    sampled, scored = samples(store, run), samples(store, run, "scoring")
    planned = episodes * RUNTIME["sample_per_episode"]
    assert len(sampled) == len(set(sampled["sample_id"])) == planned
    assert list(scored["sample_id"]) == list(sampled["sample_id"])
    wanted = (sampled["episode"] - staleness).clip(lower=0)
    assert list(sampled["policy_version"]) == list(wanted)
    counts = [c["rows"] for c in commits(store, run)]
    # A group whose rewards are all the same teaches nothing, and is filtered by who trains.
    given = [c["trained"] + c["filtered"] for c in counts]
    assert given == [RUNTIME["sample_per_episode"]] * episodes


def assert_same_bits(store: Path, run: str, *, reference: str) -> None:
    """Same shards, byte for byte, and same weights at each version."""
    assert shard_digests(store, run) == shard_digests(store, reference)
    of_run, of_reference = (
        [{m: c["digest"] for m, c in commit["checkpoints"].items()} for commit in commits(store, r)]
        for r in (run, reference)
    )
    assert of_run == of_reference
