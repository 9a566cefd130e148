"""Runs on files that workers read themselves: the same bits as of rows that were sent to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows.data import LazyRows, load_rows
from rlhf_flows.errors import DataError
from tests.end_to_end.whole_run import assert_same_bits, learn, toy_engine

pytestmark = pytest.mark.usefixtures("services")

ROWS = [{"prompt": str(i), "id": f"row-{i}", "n": i} for i in range(64)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


def lazy(path: Path) -> Any:
    rows = load_rows(path, in_memory_bytes=0)
    assert isinstance(rows, LazyRows)
    return rows


@pytest.mark.slow
def test_a_file_read_by_workers_gives_the_bits_of_one_that_is_sent(
    file: Path, tmp_path: Path
) -> None:
    learn(toy_engine().set_dataset(ROWS), tmp_path, "sent")
    learn(toy_engine().set_dataset(lazy(file)), tmp_path, "read")
    assert_same_bits(tmp_path, "read", reference="sent")


@pytest.mark.long
def test_a_large_file_is_mixed_with_rows_of_a_program(file: Path, tmp_path: Path) -> None:
    few = [{"prompt": "few", "id": f"few-{i}", "n": i} for i in range(4)]
    for run, rows in (("sent", ROWS), ("read", lazy(file))):
        learn(toy_engine().set_multiple_datasets([rows, few]), tmp_path, run, num_episode=1)
    assert_same_bits(tmp_path, "read", reference="sent")


def test_a_file_that_changed_after_the_check_ends_the_run_with_the_next_step(
    file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(file.read_bytes())
    rows = lazy(path)
    path.write_text('{"prompt": "another"}')
    with pytest.raises(DataError, match=r"rows\.jsonl has 21 bytes on .*every node must have the"):
        learn(toy_engine(eval_rows=0).set_dataset(rows), tmp_path / "runs", "changed")
