from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

import rlhf_flows.data as data
from rlhf_flows.data import COLUMNS, COLUMNS_VERSION

PAGE = (Path(__file__).parents[2] / "docs" / "columns.md").read_text()


def test_the_published_table_is_the_one_in_the_code() -> None:
    published = re.findall(
        r"^\| `(\w+)` \| ([\w, ]+) \| [\w ]+ \| (\w+) \| (.+) \|$", PAGE, re.MULTILINE
    )
    in_code = [
        (c.name, c.dtype + (", ragged" if c.ragged else ""), c.phase, c.meaning) for c in COLUMNS
    ]
    assert published == in_code
    assert f"Version {COLUMNS_VERSION} of the table" in PAGE


def test_every_dtype_of_the_table_exists() -> None:
    assert all(c.dtype == "str" or hasattr(torch, c.dtype) for c in COLUMNS)


def test_every_public_name_can_be_loaded() -> None:
    assert [name for name in data.__all__ if not hasattr(data, name)] == []
    assert sorted(data._MODULE_OF) == sorted(data.__all__)


def test_plans_and_streams_load_neither_torch_nor_pyarrow() -> None:
    code = (
        "import sys, rlhf_flows.data.plan, rlhf_flows.data.stream, rlhf_flows.data.rows;"
        "from rlhf_flows.data import StreamDataset, make_plan, load_rows, cut_by_tokens, COLUMNS;"
        "print(sorted({'torch', 'pyarrow', 'fsspec', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
