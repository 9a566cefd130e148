"""Rows of large files, read when they are asked for: the same rows, in flat memory."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.data import (
    DemonstrationDataset,
    LazyRows,
    PreferenceDataset,
    load_rows,
    open_here,
    rows_digest,
    where_of,
)
from rlhf_flows.data.row_sequences import indices_to_check
from rlhf_flows.errors import DataError
from rlhf_flows.models.tiny import character_tokenizer

ROOT = Path(__file__).parents[2]
lazy = partial(load_rows, in_memory_bytes=0)

ROWS: list[dict[str, Any]] = [
    {"prompt": f"p{i} é", "answer": "a" * (i % 7), "n": i if i % 3 else i + 0.5}
    | ({"hint": ["h"]} if i == 31 else {})
    for i in range(50)
]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def test_a_large_file_is_read_when_asked_for_and_a_small_one_at_once(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", ROWS)
    assert isinstance(load_rows(path), list)
    assert isinstance(load_rows(path, in_memory_bytes=path.stat().st_size), list)
    assert isinstance(load_rows(path, in_memory_bytes=path.stat().st_size - 1), LazyRows)


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_rows_digest_and_slices_are_those_of_the_file_in_memory(tmp_path: Path, name: str) -> None:
    rows = [{**row, "n": float(row["n"])} for row in ROWS] if name == "p.parquet" else ROWS
    path = written(tmp_path / name, rows)
    whole, rows_of_file = load_rows(path), lazy(path)
    assert list(rows_of_file) == whole
    assert [type(row["n"]) for row in rows_of_file] == [float] * len(ROWS)
    assert [rows_of_file[i] for i in (-1, 0, 17)] == [whole[i] for i in (-1, 0, 17)]
    assert list(rows_of_file[5:40:3]) == whole[5:40:3]
    assert where_of(rows_of_file[5:], 2) == where_of(whole, 7)
    assert rows_digest(rows_of_file) == rows_digest(whole)
    assert rows_digest(rows_of_file, parts=(20, 30)) == rows_digest(whole, parts=(20, 30))
    with pytest.raises(IndexError):
        rows_of_file[len(ROWS)]


values = st.none() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False)
lines = st.lists(
    st.one_of(
        st.sampled_from([b"", b"  ", b"\r"]),
        st.fixed_dictionaries(
            {"prompt": st.text(min_size=1)}, optional={"a": values, "b": st.text(max_size=3)}
        ).map(
            lambda row: json.dumps(row, ensure_ascii=bool(len(row) % 2)).encode("utf-8", "replace")
        ),
    ),
    max_size=8,
)


@given(lines=lines, mark=st.booleans(), crlf=st.booleans())
def test_whatever_the_lines_are_a_lazy_file_says_what_a_loaded_one_does(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], mark: bool, crlf: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / f"{uuid4()}.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * mark + (b"\r\n" if crlf else b"\n").join(lines))
    found: list[Any] = []
    for load in (load_rows, lazy):
        try:
            rows = load(path)
            found.append(
                (list(rows), rows_digest(rows), [where_of(rows, i) for i in range(len(rows))])
            )
        except DataError as e:
            found.append(str(e))
    path.unlink()
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_rows_travel_by_the_name_of_their_file(tmp_path: Path, name: str) -> None:
    rows = lazy(written(tmp_path / name, [{"prompt": "x" * 1000, "n": i} for i in range(500)]))
    travelling = pickle.dumps(rows)
    assert len(travelling) < 20 * len(rows) + 2000
    arrived = pickle.loads(travelling)
    open_here(arrived)
    assert list(arrived) == list(rows)


def test_a_file_that_is_not_there_or_another_is_refused_where_it_is_to_be_read(
    tmp_path: Path,
) -> None:
    path = written(tmp_path / "p.jsonl", ROWS)
    arrived = pickle.loads(pickle.dumps(lazy(path)))
    path.write_text(path.read_text().replace("p7 é", "q7 é"))  # as long as it was
    open_here(arrived)
    with pytest.raises(DataError, match=r"p\.jsonl, line 8 is not what it was"):
        arrived[7]
    assert arrived[8]["prompt"] == "p8 é"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"has 2 bytes on .*every node must have the same file"):
        open_here(arrived)
    path.unlink()
    with pytest.raises(DataError, match=r"no such file.*under this path, or on object storage"):
        open_here(arrived)


def test_of_a_large_file_items_are_checked_here_and_there_of_a_list_all(tmp_path: Path) -> None:
    many = lazy(written(tmp_path / "p.jsonl", ROWS))
    assert list(indices_to_check(many, 30)) == list(range(30))
    chosen = list(indices_to_check(many, 10**6))
    assert (len(chosen), chosen[0], chosen[-1]) == (10_000, 0, 10**6 - 1)
    assert all(a < b for a, b in itertools.pairwise(chosen))
    assert indices_to_check(list(many), 10**6) == range(10**6)


def test_a_changed_file_is_looked_at_again(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", ROWS)
    first = lazy(path)
    assert lazy(path) is first
    path.write_text(path.read_text() + '\n{"prompt": "more"}')
    assert len(lazy(path)) == len(ROWS) + 1


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_objects_of_a_store_are_read_in_ranges(name: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}" * 200, "n": i} for i in range(3000)]
    url = f"memory://{uuid4()}/{name}"
    with fsspec.open(url, "wb") as file:
        file.write(written(tmp_path / name, rows).read_bytes())
    found = lazy(url)
    assert isinstance(found, LazyRows)
    assert list(pickle.loads(pickle.dumps(found))) == rows
    assert where_of(found, 4).startswith(url)
    with pytest.raises(DataError, match="no such object"):
        lazy("memory://bucket/nothing.jsonl")


@pytest.fixture
def forgetful_s3() -> Iterator[None]:
    """A connection is not kept for tests that have other credentials, or none."""
    s3fs = pytest.importorskip("s3fs")
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("forgetful_s3")
def test_objects_of_s3_are_read_in_ranges(bucket: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}" * 100, "n": i} for i in range(3000)]
    url = f"s3://{bucket}/rows.jsonl"
    with fsspec.open(url, "wb") as file:
        file.write(written(tmp_path / "p.jsonl", rows).read_bytes())
    found = pickle.loads(pickle.dumps(lazy(url)))
    assert [found[i] for i in (2999, 0, 1500)] == [rows[i] for i in (2999, 0, 1500)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "b"', r"p\.jsonl, line 5002, column 15: this is not JSON"),
        ('{"promt": "b"}', r"p\.jsonl, line 5002: 'prompt' is missing: rename 'promt'"),
        ('{"prompt": "b", "n": "x"}', r"'n' is a number in .*line 1 and text in .*line 5002"),
        ('{"prompt": "b", "id": 3}', r"line 5002 has the id 3 of .*p\.jsonl, line 4"),
        (
            '{"prompt": "b", "n": 9007199254740993}\n{"prompt": "b", "n": 0.5}',
            "line 5002: 'n' is 9",
        ),
    ],
)
def test_a_mistake_in_a_large_file_is_named_with_its_line(
    tmp_path: Path, line: str, message: str
) -> None:
    good = "".join(json.dumps({"prompt": "a", "n": i, "id": i}) + "\n" for i in range(5000))
    path = tmp_path / "p.jsonl"
    path.write_text(good + "\n" + line)
    with pytest.raises(DataError, match=message):
        lazy(path)


@pytest.mark.slow
def test_one_broken_line_in_a_million_is_found_and_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with path.open("w") as file:
        for number in range(1_000_000):
            good = f'{{"prompt": "what is {number}?", "answer": "{number}"}}\n'
            file.write(good if number != 734_900 else good.replace(",", ""))
    started = time.process_time()
    with pytest.raises(DataError, match=r"p\.jsonl, line 734901, column 30: this is not JSON"):
        load_rows(path)
    assert time.process_time() - started < 30  # 4 s were measured


def test_a_parquet_file_that_is_small_on_disk_alone_is_read_by_groups(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pd.DataFrame({"prompt": ["x" * 5000] * 2000}).to_parquet(path, use_dictionary=False)
    limit = path.stat().st_size * 2
    assert isinstance(load_rows(path, in_memory_bytes=limit), LazyRows)


def test_datasets_of_large_files_look_at_no_row_until_it_is_asked_for(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    rows = lazy(
        written(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b"}] * 9 + [{"prompt": "a"}])
    )
    made = DemonstrationDataset(rows, tokenizer, max_tokens=8)
    assert made[3]["completion"] == "b"
    with pytest.raises(DataError, match=r"a\.jsonl, line 10 needs a text under 'completion'"):
        made.check()
    pairs = [{"prompt": "a", "pos_answers": ["b"] * n, "neg_answers": ["c"] * n} for n in (2, 1, 3)]
    made_pairs = PreferenceDataset(
        lazy(written(tmp_path / "b.jsonl", pairs)), tokenizer, max_tokens=8, max_pairs_per_prompt=2
    )
    assert len(made_pairs) == 5
    made_pairs.check()
    assert "pos_answers" not in made_pairs[4]


PEAK = """
import json, sys
from rlhf_flows.data import DemonstrationDataset, load_rows

class Letters:
    chat_template, eos_token_id = None, 0

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}

def peak():
    # ru_maxrss would be the parent's where that was larger when it forked.
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0]) * 1024

def used(path):
    rows = load_rows(path, in_memory_bytes=1 << 20)
    dataset = DemonstrationDataset(rows, Letters(), max_tokens=1 << 20)
    for index in range(0, len(rows), 101):
        dataset[index]
    return [type(rows).__name__, len(rows)]

used(sys.argv[1])  # what libraries take once
before = peak()
print(json.dumps([*used(sys.argv[2]), peak() - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for its peak")
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_memory_stays_flat_on_a_file_of_fifty_megabytes(tmp_path: Path, suffix: str) -> None:
    small, large = tmp_path / f"small.{suffix}", tmp_path / f"large.{suffix}"
    for path, count in ((small, 3_000), (large, 50_000)):
        rows: list[dict[str, Any]] = [
            {"id": i, "prompt": os.urandom(450).hex(), "answer": "yes" * 20} for i in range(count)
        ]
        if suffix == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
    words = [sys.executable, "-c", PEAK, str(small), str(large)]
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    kind, found, grown = json.loads(done.stdout.splitlines()[-1])
    assert kind in ("JsonlRows", "ParquetRows")
    assert found == 50_000
    assert grown < 50e6 / 3, f"grew by {grown / 1e6:.0f} MB"
