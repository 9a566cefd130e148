"""Shards as readers see them that know nothing of us: pandas and DuckDB."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from rlhf_flows.data import to_parquet
from tests.duckdb_process import query

SHARDS = [
    {
        "sample_id": [f"e000000-r000004-s0{i}"],
        "group": torch.tensor([4]),
        "prompt": ["2 + 2 = é"],
        "response_ids": [torch.arange(i)],
        "behaviour_logprobs": [-torch.arange(float(i))],
        "hidden": torch.full((1, 2), 0.5, dtype=torch.bfloat16),
        "half": torch.tensor([1.5], dtype=torch.float16),
        "reward": torch.tensor([float(i)]),
        "info": [{"steps": [1, i], "why": None}],
        "note": [None if i == 0 else "text"],
        "right": torch.tensor([True]),
    }
    for i in range(3)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "episodes" / "episode=000000" / "rollout"
    place.mkdir(parents=True)
    for index, shard in enumerate(SHARDS):
        (place / f"shard-{index:05d}.parquet").write_bytes(to_parquet(shard))
    return tmp_path


def test_duckdb_sees_lists_of_numbers_over_all_shards(folder: Path) -> None:
    files = f"'{folder}/episodes/*/rollout/*.parquet'"
    found = query(f"describe select * from {files}")
    assert {name: kind for name, kind, *_ in found} == {
        "sample_id": "VARCHAR",
        "group": "BIGINT",
        "prompt": "VARCHAR",
        "response_ids": "INTEGER[]",
        "behaviour_logprobs": "FLOAT[]",
        "hidden": "FLOAT[]",
        "half": "FLOAT",
        "reward": "FLOAT",
        "info": "VARCHAR",
        "note": "VARCHAR",
        "right": "BOOLEAN",
        "episode": "VARCHAR",  # of the folder, with its leading zeros
    }
    rows = query(
        f"select response_ids, behaviour_logprobs, hidden, half, info->>'$.steps[1]', note "
        f"from {files} order by sample_id"
    )
    assert rows[0] == [[], [], [0.5, 0.5], 1.5, "0", None]
    assert rows[2] == [[0, 1], [0.0, -1.0], [0.5, 0.5], 1.5, "2", "text"]
    mean = query(f"select avg(reward), avg(len(response_ids)) from {files}")
    assert mean == [[1.0, 1.0]]


def test_the_query_of_the_documentation_counts_each_sample_once_beside_a_damaged_shard(
    folder: Path,
) -> None:
    page = (Path(__file__).parents[2] / "docs/store.md").read_text("utf-8")
    found = re.search(r"CREATE VIEW rollout.*FROM rollout;", page, re.DOTALL)
    assert found is not None
    asked = found[0].replace("runs/RUN", str(folder))
    assert query(asked) == [[3, 3]]
    shards = folder / "episodes/episode=000000/rollout"
    (shards / "shard-00001.g1.parquet").write_bytes(to_parquet(SHARDS[1]))
    assert query(asked) == [[4, 3]]
    (shards / "shard-00001.tombstone.json").write_text("{}")
    assert query(asked) == [[3, 3]]


def test_pandas_sees_arrays_of_numbers(folder: Path) -> None:
    frame = pd.read_parquet(folder / "episodes")
    assert len(frame) == 3
    assert frame["response_ids"].map(list).tolist() == [[], [0], [0, 1]]
    assert frame["behaviour_logprobs"].map(list).tolist() == [[], [0.0], [0.0, -1.0]]
    assert frame["hidden"].iloc[0].tolist() == [0.5, 0.5]
    assert frame["reward"].mean() == 1.0
    assert frame["prompt"].iloc[0] == "2 + 2 = é"
