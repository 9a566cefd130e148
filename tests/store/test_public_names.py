"""What the room offers, and what it costs to enter."""

from __future__ import annotations

import rlhf_flows.store


def test_every_public_name_exists_and_the_list_is_sorted():
    names = rlhf_flows.store.__all__
    assert names == sorted(names)
    assert all(hasattr(rlhf_flows.store, name) for name in names)


def test_a_local_store_needs_neither_torch_nor_s3fs(start_python, tmp_path):
    code = """
import sys
from rlhf_flows.store import open_store
open_store(sys.argv[1]).put_if_absent("k", b"")
heavy = {"torch", "s3fs", "fsspec", "aiohttp", "ray", "prefect", "pyarrow"}
print(sorted(heavy & set(sys.modules)))
"""
    assert start_python(code, str(tmp_path)).communicate()[0] == "[]\n"
