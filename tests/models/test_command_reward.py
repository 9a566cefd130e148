"""Programs that score completions, and programs that misbehave: nothing of them is left running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rlhf_flows.data.batch import Batch
from rlhf_flows.errors import ConfigError, RewardError
from rlhf_flows.models.command_reward import CommandReward

ROOT = Path(__file__).parents[2]
TESTED = [sys.executable, "examples/rewards/run_tests.py"]


def batch(*completions: str, **columns: list[Any]) -> Batch:
    return {
        "sample_id": [f"e000000-r00000{i}-s00" for i in range(len(completions))],
        "prompt": ["p"] * len(completions),
        "completion": list(completions),
        "response_ids": [torch.arange(2) for _ in completions],
        **columns,
    }


@pytest.fixture
def marker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A variable of the environment that all processes of a test's programs carry.

    After each test none of them is there, and no folder of theirs.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv("TEST_MARK", mark)
    yield mark
    assert [p.cmdline() for p in marked(mark)] == []
    assert list((tmp_path / "tmp").iterdir()) == []


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            # Not this process itself, nor one whose environment was never read.
            if process.pid != os.getpid() and process.environ().get("TEST_MARK") == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def python(tmp_path: Path, program: str) -> list[str]:
    """A command that runs `program`, which finds its row as `row`."""
    file = tmp_path / f"program{len(list(tmp_path.iterdir()))}.py"
    head = "import json, os, signal, sys, time\nrow = json.loads(sys.stdin.read())\n"
    file.write_text(head + textwrap.dedent(program))
    return [sys.executable, "-I", "-S", str(file)]


def reward(command: Sequence[str], **options: Any) -> CommandReward:
    made = CommandReward(command=command, **{"environment": ["TEST_MARK"], **options})
    made.validate()
    made.setup()
    return made


def failure(command: Sequence[str], **options: Any) -> str:
    """The cause of the one sample that fails, beside one that does not."""
    out = reward(command, on_failure="score", failure_reward=-1.0, **options).forward_step(
        batch("bad", "good")
    )
    assert out["reward"].tolist() == [-1.0, 1.0]
    assert out["reward_failed"].tolist() == [True, False]
    assert out["reward_failure"][1] is None
    return str(out["reward_failure"][0])


# ---- what it does -----------------------------------------------------------------------------


def test_the_row_goes_in_as_json_and_the_last_line_comes_out(marker: str, tmp_path: Path) -> None:
    command = python(
        tmp_path,
        """
        assert sorted(row) == ["answer", "completion", "weight", "prompt", "sample_id"] or \\
            sorted(row) == ["answer", "completion", "prompt", "sample_id", "weight"], row
        print("a word before")
        value = len(row["completion"]) + len(row["answer"]["of"])
        print(json.dumps({"reward": value * row["weight"], "length": len(row["completion"])}))
        """,
    )
    data = batch("", "é" * 100_000, answer=[{"of": [1]}, {"of": []}], weight=[2.0, 0.5])
    out = reward(command).forward_step(data)
    assert {name: column.tolist() for name, column in out.items()} == {
        "reward": [2.0, 50_000.0],
        "length": [0.0, 100_000.0],
    }
    assert out["reward"].dtype == torch.float32


def test_a_number_alone_is_a_reward_and_rows_keep_their_order(marker: str, tmp_path: Path) -> None:
    command = python(
        tmp_path, "time.sleep(0.2 - 0.05 * int(row['completion'])); print(row['completion'])"
    )
    out = reward(command, max_concurrency=4).forward_step(batch("0", "1", "2", "3"))
    assert out["reward"].tolist() == [0, 1, 2, 3]
    assert reward(command).forward_step(batch())["reward"].shape == (0,)


def test_no_more_programs_run_at_a_time_than_allowed(marker: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = python(
        tmp_path,
        f"""
        with open({str(log)!r}, "a") as file: file.write("+")
        time.sleep(0.1)
        with open({str(log)!r}, "a") as file: file.write("-")
        print(1)
        """,
    )
    reward(command, max_concurrency=2).forward_step(batch(*"abcdef"))
    running = [log.read_text()[:i].count("+") - log.read_text()[:i].count("-") for i in range(13)]
    assert max(running) == 2


def test_it_sees_no_credentials_and_an_empty_folder_of_its_own(
    marker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("WANTED", "yes")
    log = tmp_path / "log"
    command = python(
        tmp_path,
        f"""
        found = [sorted(os.environ), os.environ["WANTED"], os.getcwd(), os.listdir()]
        assert os.environ["HOME"] == os.environ["TMPDIR"] == os.getcwd()
        open({str(log)!r}, "w").write(json.dumps(found))
        os.makedirs("a/b"); open("a/b/c", "w").close(); os.chmod("a/b", 0); os.chmod("a", 0o500)
        print(1)
        """,
    )
    reward(command, environment=["TEST_MARK", "WANTED", "NOT_THERE"]).forward_step(batch("x"))
    names, wanted, folder, files = json.loads(log.read_text())
    assert names == [
        "HOME", "LANG", "PATH", "RLHF_FLOWS_COMMAND", "TEST_MARK", "TMPDIR", "WANTED"
    ]  # fmt: skip
    assert (wanted, files) == ("yes", [])
    assert not Path(folder).exists()


def test_no_shell_reads_the_arguments(marker: str) -> None:
    out = reward(["printf", "%s", "7; exit 1"], on_failure="score").forward_step(batch("a"))
    assert "'7; exit 1' as its last line" in out["reward_failure"][0]


# ---- what fails -------------------------------------------------------------------------------

GOOD = 'if row["completion"] == "good": print(1); sys.exit()\n'

FAILS: dict[str, tuple[str, list[str]]] = {
    "a status": (
        "print(1); sys.stderr.write('no such compiler'); sys.exit(3)",
        ["exited with status 3", "wrote 'no such compiler' to standard error"],
    ),
    "a signal": ("os.kill(os.getpid(), signal.SIGSEGV)", ["was ended by SIGSEGV"]),
    "nothing": ("print()", ["wrote nothing to standard output, expected a number"]),
    "nonsense": ("print(2); print('well done')", ["wrote 'well done' as its last line"]),
    "NaN": ("print('NaN')", ["returned nan as 'reward', expected a finite number"]),
    "infinity in JSON": ("print('{\"reward\": Infinity}')", ["returned inf as 'reward'"]),
    "text in JSON": ('print(\'{"reward": "9"}\')', ["returned '9' as 'reward'"]),
    "JSON without it": ("print('{\"score\": 1}')", ["a dict of ['score'], without 'reward'"]),
    "JSON without end": ("print('[' * 100_000)", ["as its last line, expected a number"]),
    "no text at all": ("os.write(1, bytes([255, 254]))", ["as its last line"]),
    "it closes its pipes": ("os.close(0); os.close(1); os.close(2)", ["wrote nothing"]),
}


@pytest.mark.parametrize("case", FAILS)
def test_what_is_no_reward_is_a_failure_with_its_cause(
    case: str, marker: str, tmp_path: Path
) -> None:
    program, words = FAILS[case]
    found = failure(python(tmp_path, GOOD + textwrap.dedent(program)))
    for word in words:
        assert word in found


def test_a_failure_ends_the_run_with_the_sample_and_the_cause(marker: str, tmp_path: Path) -> None:
    command = python(tmp_path, "print(1) if row['completion'] == 'good' else sys.exit('no way')")
    with pytest.raises(RewardError) as raised:
        reward(command).forward_step(batch("good", "bad"))
    for word in ("/program1.py", "of module 'reward'", "status 1", "'no way'", "r000001", "'bad'"):
        assert word in str(raised.value)


def test_the_first_failure_ends_those_that_run_beside_it(marker: str, tmp_path: Path) -> None:
    command = python(tmp_path, "time.sleep(60) if row['completion'] == 'slow' else sys.exit(1)")
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"status 1.*'bad'"):
        reward(command, max_concurrency=3).forward_step(batch("slow", "slow", "bad", "slow"))
    assert time.monotonic() - began < 10


def test_programs_that_all_fail_are_an_outage(marker: str, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"all 2 samples.*outage.*status 1"):
        reward(python(tmp_path, "sys.exit(1)"), on_failure="score").forward_step(batch("a", "b"))


# ---- what does not end ------------------------------------------------------------------------

FORKS_DAEMONS = """
for i in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        os._exit(0)
os.wait(); os.wait(); os.wait()
"""

LIMITS: dict[str, tuple[str, dict[str, Any], str]] = {
    "never ends": ("while True: pass", {"timeout_s": 0.5}, "took longer than 0.5 s and was ended"),
    "ignores SIGTERM": (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
        {"timeout_s": 0.5},
        "took longer than 0.5 s",
    ),
    "writes without end": (
        "while True: os.write(1, b'x' * 65536)",
        {},
        "wrote more than 1048576 bytes to standard output and was ended",
    ),
    "writes errors without end": (
        "while True: os.write(2, b'x' * 65536)",
        {"timeout_s": 0.5},
        "took longer than 0.5 s",
    ),
    "eats memory": (
        "b = bytearray(400 << 20); print(len(b)); time.sleep(600)",
        {"memory_mb": 100},
        "exited with status 1, and wrote",
    ),
    "eats memory in many processes": (
        """
        for i in range(6):
            if os.fork() == 0:
                os.setsid()
                b = bytearray(os.urandom(30 << 20))
                time.sleep(600)
        time.sleep(600)
        """,
        {"memory_mb": 100},
        "used more than 100 MiB of memory and was ended",
    ),
    "forks 30 and waits": (
        """
        for i in range(30):
            if os.fork() == 0: time.sleep(600)
        time.sleep(600)
        """,
        {"timeout_s": 0.7},
        "took longer than 0.7 s",
    ),
    "forks a bomb": (
        """
        for i in range(5): os.fork()
        time.sleep(600)
        """,
        {"max_processes": 20},
        "started more than 20 processes and was ended",
    ),
    "daemons, and ends": (FORKS_DAEMONS + "sys.exit(4)", {}, "exited with status 4"),
    "stops itself": (
        "os.kill(os.getpid(), signal.SIGSTOP)",
        {"timeout_s": 0.5},
        "took longer than 0.5 s",
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_what_does_not_end_is_ended_with_all_that_it_started(
    case: str, marker: str, tmp_path: Path
) -> None:
    program, options, words = LIMITS[case]
    began = time.monotonic()
    found = failure(
        python(tmp_path, GOOD + textwrap.dedent(program)), **{"timeout_s": 20.0, **options}
    )
    assert words in found
    assert time.monotonic() - began < 15
    assert marked(marker) == []


def test_daemons_of_a_program_that_does_well_are_ended_and_do_not_delay_it(
    marker: str, tmp_path: Path
) -> None:
    command = python(tmp_path, FORKS_DAEMONS + "print(5)")  # they hold its standard output open
    began = time.monotonic()
    assert reward(command).forward_step(batch("a", "b"))["reward"].tolist() == [5, 5]
    assert time.monotonic() - began < 10


def test_pages_that_processes_share_count_once(marker: str, tmp_path: Path) -> None:
    command = python(
        tmp_path,
        """
        b = bytearray(os.urandom(50 << 20))
        for i in range(6):
            if os.fork() == 0: time.sleep(600)
        time.sleep(0.3)
        print(1)
        """,
    )
    out = reward(command, memory_mb=150).forward_step(batch("a"))
    assert out["reward"].tolist() == [1]


def test_a_program_that_kills_its_supervisor_is_found_and_ended(
    marker: str, tmp_path: Path
) -> None:
    found = failure(
        python(tmp_path, GOOD + FORKS_DAEMONS + "os.kill(os.getppid(), 9); time.sleep(600)")
    )
    assert "its supervising process was killed" in found


def test_a_worker_that_is_killed_leaves_nothing(marker: str, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = python(tmp_path, FORKS_DAEMONS + f"open({str(ready)!r}, 'w'); time.sleep(600)")
    program = (
        "from rlhf_flows.models.command_reward import CommandReward\n"
        f"CommandReward(command={command!r}, environment=['TEST_MARK'])"
        ".forward_step({'completion': ['a']})"
    )
    folders = Path(str(tempfile.tempdir))
    worker = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "TMPDIR": str(folders)}
    )
    with worker:
        wait_for(ready.exists)
        started = len(marked(marker))
        worker.kill()
    assert started == 5  # itself, the program, three daemons
    wait_for(lambda: not marked(marker) and not any(folders.iterdir()))


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


# ---- before anything starts -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        (["no-such-program"], {}, "there is none of that name on PATH"),
        (["./plain.txt"], {}, r"may not be executed: chmod \+x it"),
        ([], {}, "no command"),
        (["true"], {"timeout_s": 0}, "timeout_s of module 'reward' is 0"),
        (["true"], {"max_concurrency": 0}, "max_concurrency of module 'reward' is 0"),
    ],
)
def test_what_cannot_be_started_is_refused(
    command: list[str], options: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.txt").write_text("x")
    with pytest.raises(ConfigError, match=words):
        CommandReward(command=command, **options).validate()


@pytest.mark.parametrize("command", ["./plain.txt", "./gone"])
def test_a_program_that_a_worker_cannot_start_ends_the_run_in_any_case(
    command: str, marker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.txt").write_text("x")
    with pytest.raises(RewardError, match=r"cannot be started on .*Error.*on every node"):
        CommandReward(command=[command], on_failure="score").forward_step(batch("a"))


def test_a_mended_program_has_another_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "check.py").write_text("print(1)")
    made = CommandReward(command=[sys.executable, "check.py"])
    before = made.fingerprint()
    assert made.command == (sys.executable, str(tmp_path / "check.py"))
    assert made.fingerprint() == before
    (tmp_path / "check.py").write_text("print(2)")
    assert made.fingerprint() != before


# ---- the example ------------------------------------------------------------------------------


def test_the_example_runs_the_tests_of_a_row_against_its_completion(
    marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    tests = ["assert double(2) == 4", "assert double(-1) == -2", "assert double('a') == 'aa'"]
    data = batch(
        "def double(x): return 2 * x",
        "def double(x): return x + abs(x)",
        "Here you are:\n```python\ndef double(x):\n    return x + x\n```\nIt doubles.",
        "def double(x) return",
        "import sys; sys.exit(0)",
        "print(9)\ndef double(x):\n    while True: pass",
        tests=[tests] * 6,
    )
    out = reward(TESTED, timeout_s=5.0).forward_step(data)
    assert out["reward"].tolist() == pytest.approx([1, 1 / 3, 1, 0, 0, 0])
    assert out["compiles"].tolist() == [1, 1, 1, 0, 1, 1]
