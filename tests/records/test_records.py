"""What is asked of runs in a store: opened, audited, exported, cleaned, by program and by command.

One run of the toys is made for all of it; what is damaged, is damaged in a copy.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rlhf_flows
from rlhf_flows import cli
from rlhf_flows.data import from_parquet, to_parquet
from rlhf_flows.errors import ConfigError, DataError, ShardDamageError
from rlhf_flows.records.audit import audit_run
from rlhf_flows.records.leftovers import collect_leftovers, find_leftovers
from rlhf_flows.store import RunLayout, commit_json, open_store
from tests.end_to_end.whole_run import assert_exactly_once, commits, learn, samples, toy_engine

LAYOUT = RunLayout("whole")


@pytest.fixture(scope="module")
def made(services: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes and two evaluations, by two attempts; weights of one version are deleted."""
    store = tmp_path_factory.mktemp("records") / "runs"
    learn(toy_engine(), store, "whole", address=services, num_episode=2, keep_last=2)
    learn(toy_engine(), store, "whole", address=services, num_episode=3, keep_last=2)
    return store


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Exit code and standard output (of a failure, the error) of a command."""

    def say(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rlhf-flows", *words])
        monkeypatch.setenv("COLUMNS", "250")
        with pytest.raises(SystemExit) as caught:
            cli.main()
        found = capsys.readouterr()
        code = int(caught.value.code or 0)
        return code, " ".join(found.err.split()) if code == 2 else found.out

    return say


# ---- opened -----------------------------------------------------------------------------------


def test_samples_are_the_rows_of_both_phases_joined(made: Path) -> None:
    table = rlhf_flows.open_run(made, "whole").samples()
    frame = table.to_pandas().sort_values("sample_id", ignore_index=True)
    sampled, scored = samples(made, "whole"), samples(made, "whole", "scoring")
    assert list(frame["sample_id"]) == list(sampled["sample_id"])
    assert list(frame["completion"]) == list(sampled["completion"])
    assert list(frame["reward"]) == list(scored["reward"])
    assert list(frame["episode"]) == list(sampled["episode"])


def test_one_episode_a_range_and_some_columns(made: Path) -> None:
    run = rlhf_flows.open_run(made, "whole")
    assert set(run.samples(1)["episode"].to_pylist()) == {1}
    some = run.samples(range(1, 3), columns=["reward", "episode"])
    assert some.column_names == ["reward", "episode"]
    assert some.num_rows == 64
    assert run.samples(columns=["sample_id"]).num_rows == 96


def test_what_is_not_there_is_named_with_what_is(made: Path) -> None:
    run = rlhf_flows.open_run(made, "whole")
    with pytest.raises(ConfigError, match=r"no samples of episode 7: it has those of 0 to 2"):
        run.samples(7)
    with pytest.raises(DataError, match=r"'rewrd' of samples \(nearest: 'reward'\)"):
        run.samples(0, columns=["rewrd"])
    with pytest.raises(ConfigError, match=r"no run 'whol' .*nearest: 'whole'"):
        rlhf_flows.open_run(made, "whol")
    with pytest.raises(ConfigError, match="there is no store"):
        rlhf_flows.open_run(made / "elsewhere", "whole")
    assert not (made / "elsewhere").exists()


def test_episodes_and_evaluations_are_what_was_committed(made: Path) -> None:
    run = rlhf_flows.open_run(f"{made}/whole")
    rows = run.episodes().to_pylist()
    assert [row["episode"] for row in rows] == [0, 1, 2]
    assert [row["attempt"] for row in rows] == [1, 1, 2]
    for row, commit in zip(rows, commits(made, "whole"), strict=True):
        assert row["reward"] == commit["metrics"]["reward"]
        assert row["planned"] == row["trained"] + row["filtered"] == 32
    evaluated = run.evaluations().to_pylist()
    assert [row["version"] for row in evaluated] == [0, 2, 3]
    assert all(row["rows"] == 16 for row in evaluated)
    assert [a["outcome"] for a in run.attempts] == ["completed", "completed"]
    assert run.config["runtime"]["num_episode"] == 2
    assert run.parent is None


def test_a_run_on_s3_reads_as_one_in_a_folder(made: Path, bucket: str) -> None:
    import s3fs

    there = f"{bucket}/{uuid4().hex}/runs"
    s3fs.S3FileSystem(skip_instance_cache=True).put(f"{made}/", there, recursive=True)
    here, far = rlhf_flows.open_run(made, "whole"), rlhf_flows.open_run(f"s3://{there}", "whole")
    assert far.samples(1).equals(here.samples(1))
    assert far.samples(range(3), columns=["reward"]).equals(here.samples(columns=["reward"]))
    assert far.episodes().equals(here.episodes())
    assert far.evaluations().equals(here.evaluations())
    audit = audit_run(open_store(f"s3://{there}"), "whole")
    assert audit.ok, audit.findings


@pytest.mark.slow
def test_sql_reads_the_tables_by_their_names(made: Path) -> None:
    # A process of its own: where torch is loaded, DuckDB prints a page of leaks at the end.
    program = f"""
import json, rlhf_flows
run = rlhf_flows.open_run({str(made)!r}, "whole")
found = run.sql("select episode, count(*) as n, avg(s.reward) as reward, any_value(e.version) as v"
                " from samples s join episodes e using (episode) group by episode order by episode")
print(json.dumps(found.to_pylist()))
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [(row["episode"], row["n"], row["v"]) for row in rows] == [
        (e, 32, e + 1) for e in (0, 1, 2)
    ]
    means = samples(made, "whole", "scoring").groupby("episode")["reward"].mean()
    assert [row["reward"] for row in rows] == pytest.approx(list(means))


def test_duckdb_that_is_missing_is_said(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(ConfigError, match="pip install duckdb"):
        rlhf_flows.open_run(made, "whole").sql("select * from samples")


def shard(store: Path, phase: str = "rollout") -> Path:
    return store / LAYOUT.shard(phase, 1, 0)  # type: ignore[arg-type]


def test_a_damaged_shard_is_an_error_and_its_next_generation_counts(store: Path) -> None:
    good = shard(store).read_bytes()
    shard(store).write_bytes(good[:200] + bytes([good[200] ^ 1]) + good[201:])
    run = rlhf_flows.open_run(store, "whole")
    with pytest.raises(ShardDamageError, match=r"shard-00000.parquet is damaged"):
        run.samples(1)
    (store / LAYOUT.tombstone("rollout", 1, 0)).write_text("{}")
    # In front of its repair: the samples of the other shards, and of this one what was scored.
    assert sum(name is None for name in run.samples(1)["completion"].to_pylist()) == 8
    (store / LAYOUT.shard("rollout", 1, 0, 1)).write_bytes(good)
    assert run.samples(1).num_rows == 32
    assert None not in run.samples(1)["completion"].to_pylist()


def test_a_sample_without_a_score_has_nulls(store: Path) -> None:
    shard(store, "scoring").unlink()
    table = rlhf_flows.open_run(store, "whole").samples(1)
    assert table["reward"].null_count == 8
    assert table["completion"].null_count == 0


# ---- audited ----------------------------------------------------------------------------------


def test_a_whole_run_adds_up(made: Path) -> None:
    assert_exactly_once(made, "whole", episodes=3)
    found = audit_run(open_store(made), "whole", digests=True)
    assert found.ok, found.findings
    assert [e.sampled for e in found.episodes] == [e.scored for e in found.episodes] == [32] * 3
    assert found.evaluations == 3
    assert found.deleted > 0
    assert found.folders > 0


def altered(store: Path, key: str, change: Callable[[Any], Any]) -> None:
    file = store / key
    if file.suffix == ".json":
        payload = json.loads(file.read_text())
        change(payload)
        file.write_text(json.dumps(payload))
    else:
        file.write_bytes(to_parquet(change(from_parquet(file.read_bytes()))))


def _rows(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    from rlhf_flows.data import select

    return select(batch, rows)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is lost": (lambda s: shard(s).unlink(), "rollout shard 0 is missing: 8 samples"),
    "a sample is lost": (
        lambda s: altered(s, LAYOUT.shard("rollout", 1, 0), lambda b: _rows(b, list(range(7)))),
        "1 samples are planned and not there",
    ),
    "a sample is there twice": (
        lambda s: altered(
            s, LAYOUT.shard("scoring", 1, 0), lambda b: _rows(b, [0, *range(8)])
        ),
        "1 samples are there more than once",
    ),
    "a sample of another episode": (
        lambda s: shutil.copy(s / LAYOUT.shard("scoring", 0, 0), shard(s, "scoring")),
        "are there and not planned",
    ),
    "a row was trained twice": (
        lambda s: altered(
            s, LAYOUT.trained(1), lambda c: c["rows"].update(trained=c["rows"]["trained"] + 1)
        ),
        "of 32 planned rows",
    ),
    "an episode was cut short": (
        lambda s: altered(
            s, LAYOUT.trained(1), lambda c: c["rows"].update(planned=31, trained=31, filtered=0)
        ),
        "its commit counts 31 rows planned, its plan has 32 in 1 passes",
    ),
    "samples of another version": (
        lambda s: altered(
            s, LAYOUT.shard("rollout", 1, 0),
            lambda b: b | {"policy_version": b["policy_version"] * 0},
        ),
        "was sampled from version [0], its plan names [1]",
    ),
    "somebody is said to be quarantined": (
        lambda s: altered(s, LAYOUT.trained(1), lambda c: c["quarantined"].append("x")),
        "its commit names ['x'] as quarantined",
    ),
    "a bit of a shard": (
        lambda s: shard(s).write_bytes(shard(s).read_bytes()[:-9] + bytes(9)),
        "is damaged",
    ),
    "a commit is lost": (lambda s: (s / LAYOUT.trained(0)).unlink(), "expected each from 0 on"),
    "weights are lost": (
        lambda s: shutil.rmtree(next((s / "whole/weights/version=000003").iterdir())),
        "weights of 'trainer'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_add_up_is_found(case: str, store: Path) -> None:
    breaks, says = BROKEN[case]
    breaks(store)
    found = audit_run(open_store(store), "whole")
    assert not found.ok
    assert says in " | ".join(f.says for f in found.findings)


def test_a_flipped_bit_of_weights_is_found_by_their_digest_alone(store: Path) -> None:
    (file,) = (store / "whole/weights/version=000003").rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()  # it may be a hard link
    file.write_bytes(data)
    assert audit_run(open_store(store), "whole").ok
    (finding,) = audit_run(open_store(store), "whole", digests=True).findings
    assert finding.where == "version 3"
    assert "not what was committed" in finding.says


# ---- cleaned ----------------------------------------------------------------------------------


def attempt(store: Path, number: int, **who: Any) -> None:
    """One that has not ended."""
    record = json.loads((store / LAYOUT.attempt(1)).read_text())
    commit_json(open_store(store), LAYOUT.attempt(number), record | {"number": number} | who)


def folder(store: Path, version: int, *, age_s: float = 7200.0) -> Path:
    """A folder of weights that no commit lists."""
    made = store / LAYOUT.weights_prefix(version, f"trainer-{version:032x}")
    made.mkdir(parents=True)
    (made / "model.safetensors").write_bytes(b"x" * 100)
    then = time.time() - age_s
    os.utime(made / "model.safetensors", (then, then))
    return made


def test_folders_without_a_commit_go_once_nobody_lives(store: Path) -> None:
    unlisted, uncommitted, young = folder(store, 2), folder(store, 4), folder(store, 5, age_s=0)
    before = sorted(store.rglob("*"))
    found = find_leftovers(open_store(store), "whole")
    assert {(f.version, f.kind) for f in found.folders} == {(2, "unlisted"), (4, "uncommitted")}
    assert found.size_bytes == 200
    assert sorted(store.rglob("*")) == before  # a look changes nothing
    assert collect_leftovers(open_store(store), "whole") == found
    assert [f.exists() for f in (unlisted, uncommitted, young)] == [False, False, True]
    assert audit_run(open_store(store), "whole", digests=True).ok
    assert find_leftovers(open_store(store), "whole").folders == ()


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_what_an_attempt_may_still_commit_stays(host: str, store: Path) -> None:
    unlisted, uncommitted = folder(store, 2), folder(store, 4)
    import psutil

    process = psutil.Process(os.getppid())  # alive, and not this one
    attempt(
        store, 3,
        host=socket.gethostname() if host == "here" else "another-host",
        pid=process.pid, process_started_s=process.create_time(),
    )  # fmt: skip
    found = collect_leftovers(open_store(store), "whole")
    assert [f.kind for f in found.folders] == ["unlisted"]
    assert f"attempt 3, process {process.pid}" in found.kept_for
    assert [unlisted.exists(), uncommitted.exists()] == [False, True]
    found = collect_leftovers(open_store(store), "whole", assume_dead=True)
    assert [f.kind for f in found.folders] == ([] if host == "here" else ["uncommitted"])
    assert uncommitted.exists() == (host == "here")


def test_an_attempt_whose_process_is_gone_holds_nothing(store: Path) -> None:
    uncommitted = folder(store, 4)
    attempt(store, 3, host=socket.gethostname(), pid=2**22 + 1)
    assert collect_leftovers(open_store(store), "whole").kept_for == ""
    assert not uncommitted.exists()


def test_what_retention_did_not_come_to_goes_with_its_record(store: Path) -> None:
    """As the newest attempt was asked to keep: here fewer than the run has."""
    attempt(store, 3, host=socket.gethostname(), pid=2**22 + 1, changed={"runtime.keep_last": 1})
    found = collect_leftovers(open_store(store), "whole")
    assert {(f.version, f.kind) for f in found.folders} == {(2, "retention")}
    assert [
        p.name for p in (store / "whole/weights").iterdir() if any(p.rglob("*.safetensors"))
    ] == ["version=000003"]
    assert audit_run(open_store(store), "whole", digests=True).ok


# ---- by command -------------------------------------------------------------------------------


def test_runs_are_listed(made: Path, said: Callable[..., tuple[int, str]]) -> None:
    code, out = said("runs", "--store", str(made), "--json")
    assert code == 0
    (run,) = json.loads(out)["runs"]
    assert run.pop("created_at")
    assert run == {
        "run": "whole", "recipe": "toy", "episodes": 3, "num_episode": 3, "attempts": 2,
        "outcome": "completed", "parent": None,
    }  # fmt: skip
    for word in ("runs", "ls"):
        assert "3 of 3" in said(word, "--store", str(made))[1]


def test_episodes_and_the_best_samples(made: Path, said: Callable[..., tuple[int, str]]) -> None:
    code, out = said("episodes", "whole", "--store", str(made), "--json")
    assert [e["episode"] for e in json.loads(out)["episodes"]] == [0, 1, 2]
    assert "whole: episodes" in said("episodes", "whole", "--store", str(made))[1]
    words = ("samples", "whole", "--episode", "1", "--store", str(made))
    of = {}
    for way in ("best", "worst"):
        found = json.loads(said(*words, f"--{way}", "5", "--json")[1])
        assert found["of"] == 32
        of[way] = [s["reward"] for s in found["samples"]]
    rewards = sorted(samples(made, "whole", "scoring").query("episode == 1")["reward"])
    assert of == {"worst": rewards[:5], "best": rewards[:-6:-1]}
    code, out = said(*words)
    assert out.count("e000001-r") == 8
    code, error = said(*words, "--best", "3", "--by", "rewad")
    assert code == 2
    assert "nearest: 'reward'" in error


def test_the_audit_of_a_broken_run_ends_with_1(
    store: Path, said: Callable[..., tuple[int, str]]
) -> None:
    words = ("audit", "whole", "--store", str(store))
    code, out = said(*words, "--digests")
    assert code == 0
    assert "everything adds up" in out
    shard(store).unlink()
    code, out = said(*words)
    assert code == 1
    assert "wrong: episode 1: rollout shard 0 is missing" in out
    code, out = said(*words, "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)


def test_an_episode_is_exported(
    made: Path, tmp_path: Path, said: Callable[..., tuple[int, str]]
) -> None:
    words = ("export", "whole", "--episode", "2", "--to", str(tmp_path), "--store", str(made))
    code, out = said(*words, "--json")
    file = Path(json.loads(out)["path"])
    assert pq.read_table(file).equals(rlhf_flows.open_run(made, "whole").samples(2))
    code, error = said(*words)
    assert code == 2
    assert "is there already" in error
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_gc_says_what_would_go_before_it_goes(
    store: Path, said: Callable[..., tuple[int, str]]
) -> None:
    left = folder(store, 4)
    for words, there in ((("--dry-run",), True), ((), False)):
        _, out = said("gc", "whole", "--store", str(store), "--json", *words)
        assert [f["kind"] for f in json.loads(out)["folders"]] == ["uncommitted"]
        assert left.exists() == there
    assert "nothing of whole can go" in said("gc", "whole", "--store", str(store))[1]


def test_a_table_of_no_rows_has_its_columns() -> None:
    from rlhf_flows.records.sample_tables import stacked

    assert stacked([]).num_rows == 0
    assert isinstance(stacked([]), pa.Table)
