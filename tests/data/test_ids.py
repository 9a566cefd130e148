"""Ids of rows: none comes twice, and they travel with the samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rlhf_flows.data import PreferenceDataset, PromptDataset, check_ids, load_rows
from rlhf_flows.errors import DataError
from rlhf_flows.models.tiny import character_tokenizer


def written(path: Path, ids: list[Any]) -> Path:
    rows = [{"prompt": f"{i}", **({} if v is None else {"id": v})} for i, v in enumerate(ids)]
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("p.jsonl", "line 3", "line 7"),
        ("p.json", "row 1", "row 3"),
        ("p.parquet", "row 1", "row 3"),
    ],
)
def test_an_id_that_comes_twice_is_refused_with_both_rows(
    tmp_path: Path, name: str, first: str, second: str
) -> None:
    path = written(tmp_path / name, ["a", "b", "c", "b", "a"])
    message = rf"{name}, {second} has the id 'b' of .*{name}, {first}: .* give each another"
    with pytest.raises(DataError, match=message):
        load_rows(path)


def test_ids_are_text_or_numbers_and_some_rows_may_have_none(tmp_path: Path) -> None:
    rows = load_rows(written(tmp_path / "p.jsonl", [7, None, 8, None]))
    assert [row["id"] for row in rows] == [7, None, 8, None]
    with pytest.raises(DataError, match=r"line 1: the id is a list: give text or a number"):
        load_rows(written(tmp_path / "q.jsonl", [[1], [2]]))
    with pytest.raises(DataError, match=r"line 3: the id is a bool"):
        load_rows(written(tmp_path / "r.jsonl", [None, True]))


def test_ids_of_one_hash_are_two_ids() -> None:
    assert hash(-1) == hash(-2)
    check_ids([{"id": -1}, {"id": -2}])
    with pytest.raises(DataError, match="row 2 has the id -1 of row 0"):
        check_ids([{"id": -1}, {"id": -2}, {"id": -1}])
    check_ids(["not", "a", "mapping", "not"])


def test_the_id_travels_with_an_item_and_with_each_pair_of_its_row() -> None:
    (item,) = PromptDataset([{"prompt": "a", "id": "x7"}], character_tokenizer(), max_tokens=4)
    assert item["id"] == "x7"
    row = {"prompt": "a", "pos_answers": ["b", "c"], "neg_answers": ["d", "e"], "id": 7}
    pairs = PreferenceDataset([row], character_tokenizer(), max_tokens=4)
    assert [pairs[i]["id"] for i in range(len(pairs))] == [7, 7]
