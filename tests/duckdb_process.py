"""DuckDB in a process of its own: at the end of one that torch shares it prints a page of leaks."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_PROGRAM = """
import json, sys, duckdb
print(json.dumps(duckdb.sql(sys.argv[1]).fetchall()))
"""


def query(sql: str) -> list[list[Any]]:
    """The rows of an SQL query."""
    command = [sys.executable, "-W", "ignore", "-c", _PROGRAM, sql]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    rows: list[list[Any]] = json.loads(done.stdout)
    return rows
