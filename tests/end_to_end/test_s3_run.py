"""A run whose store is a bucket: the bits of a run in a folder, also when killed half-way.

Each flow process starts a Ray head of its own, whose workers inherit the credentials from it: the
session's head may be older than the S3 server, and could not know them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from rlhf_flows import cli
from rlhf_flows.store import open_store
from tests.end_to_end.processes import generated, start_victim, watched
from tests.end_to_end.whole_run import (
    assert_exactly_once,
    assert_same_bits,
    commits,
    evaluated_versions,
    samples,
)
from tests.s3_server import real_bucket

RUNTIME: dict[str, Any] = {"num_episode": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """What runs in a bucket left; the environment points to its server."""

    url: str
    copy: Path
    """Every object below the URL; beside them the run `local`, which knew of no bucket."""
    copy_at_death: Path
    """What there was of the run `killed` when it died."""
    logs: Path
    ray_logs: Path


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["moto", pytest.param("real", marks=pytest.mark.s3)])
def runs(
    request: pytest.FixtureRequest, prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    with contextlib.ExitStack() as stack:
        if request.param == "moto":
            bucket = request.getfixturevalue("bucket")
        else:
            bucket = stack.enter_context(real_bucket())
        # Of a short name: Ray's sockets are in it.
        ray_logs = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp"))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("RAY_TMPDIR", ray_logs)
        left = Runs(
            url=f"s3://{bucket}/some/folder",
            copy=tmp_path_factory.mktemp("copy"),
            copy_at_death=tmp_path_factory.mktemp("copy_at_death"),
            logs=tmp_path_factory.mktemp("logs"),
            ray_logs=Path(ray_logs),
        )
        first = [(left.copy, "local"), (left.url, "whole")]
        run_killed(left, -signal.SIGKILL, first=first, die="advanced rollout 1 2")
        download(left.url, left.copy_at_death)
        run_killed(left, 0, die="never")
        download(left.url, left.copy)
        yield left


def run_killed(runs: Runs, status: int, **how: Any) -> None:
    """A process with a Ray head of its own, from its start to the end of all that it started."""
    log = runs.logs / "killed.calls"
    victim = start_victim(runs.url, "killed", log, address=None, **how, **RUNTIME)
    for process in watched(victim, timeout_s=100):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert victim.returncode == status, log.with_suffix(".log").read_text()[-3000:]


def download(url: str, folder: Path) -> None:
    store = open_store(url)
    for info in store.list():
        path = folder / info.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.get(info.key))


def test_a_run_in_a_bucket_has_the_bits_of_one_in_a_folder(runs: Runs) -> None:
    assert_same_bits(runs.copy, "whole", reference="local")
    assert_exactly_once(runs.copy, "whole", episodes=2)
    assert evaluated_versions(runs.url, "whole") == [0, 2]
    assert keys(runs.copy / "whole") == keys(runs.copy / "local")


def keys(run: Path) -> set[str]:
    """But for the names that are drawn, of folders of weights and state."""
    files = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return {str(file.parent.parent / file.name if drawn(file) else file) for file in files}


def drawn(file: Path) -> bool:
    return file.parts[0] in {"weights", "checkpoints"}


def test_a_run_killed_half_way_goes_on_from_what_is_in_the_bucket(runs: Runs) -> None:
    assert_same_bits(runs.copy, "killed", reference="local")
    assert_exactly_once(runs.copy, "killed", episodes=2)
    assert len(commits(runs.copy_at_death, "killed")) == 1
    stored = set(samples(runs.copy_at_death, "killed")["sample_id"])
    assert len(stored) >= 32 + 2 * 8
    ids = generated(runs.logs / "killed.calls")
    again = {name for name in ids if ids.count(name) > 1}
    assert not again & stored
    assert {p.name for p in (runs.copy / "killed/attempts").iterdir()} == {
        "000001.json",
        "000002.json",
        "000002.ended.json",
    }


def test_the_command_line_reads_a_bucket(
    runs: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["rlhf-flows", *words, "--store", runs.url])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code
        return capsys.readouterr().out

    listed = [line.split() for line in said("ls").splitlines()]
    assert [[row[0], row[2:5], row[5]] for row in listed if "of" in row] == [
        ["killed", ["2", "of", "2"], "2"],
        ["whole", ["2", "of", "2"], "1"],
    ]
    shown = said("show", "killed")
    assert "killed: episodes" in shown
    last = samples(runs.copy, "killed").query("episode == 1")
    assert any(name in shown for name in last["sample_id"])

    said("export", "killed", "--to", str(tmp_path / "model"))
    weights = commits(runs.copy, "local")[-1]["checkpoints"]["trainer"]["weights"]["prefix"]
    exported = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    assert exported == {p.name: p.read_bytes() for p in (runs.copy / weights).iterdir()}


def test_the_credentials_are_in_no_object_and_in_no_log(runs: Runs) -> None:
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    objects = [path for path in runs.copy.rglob("*") if path.is_file()]
    assert runs.copy / "killed/run.json" in objects
    assert [path for path in objects if secret in readable(path)] == []
    logs = [path for path in (*runs.ray_logs.rglob("*"), *runs.logs.iterdir()) if path.is_file()]
    # Ray writes down the environment that it is asked for.
    assert [path for path in logs if b"OMP_NUM_THREADS" in path.read_bytes()]
    assert [path for path in logs if secret in path.read_bytes()] == []


def readable(path: Path) -> bytes:
    """What a file holds; of Parquet, also what its compression hides."""
    data = path.read_bytes()
    if path.suffix != ".parquet":
        return data
    table = pq.read_table(path)
    return data + repr((table.schema.metadata, table.to_pylist())).encode()
