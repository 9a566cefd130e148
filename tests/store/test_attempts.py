"""Attempts as fencing tokens."""

from __future__ import annotations

import os
import pickle
import platform
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlhf_flows.errors import FencedError, RunBusyError
from rlhf_flows.store import (
    RunLayout,
    check_fence,
    commit_json,
    deaths_in_a_row,
    end_attempt,
    newest_attempt,
    read_json,
    take_attempt,
)

STARTER = """
import sys
from rlhf_flows.errors import RunBusyError
from rlhf_flows.store import end_attempt, open_store, take_attempt
store = open_store(sys.argv[1])
sys.stdin.readline()
try:
    print(take_attempt(store, "r", flow_run_id=None, changed={}).number, flush=True)
except RunBusyError:
    print("busy", flush=True)
sys.stdin.readline()
"""


def take(store, **options):
    return take_attempt(store, "r", flow_run_id="f", changed={"a": 1}, **options)


def say_go(process):
    process.stdin.write("go\n")
    process.stdin.flush()


def started(start_python, store):
    process = start_python(STARTER, store.url)
    say_go(process)
    assert process.stdout.readline() == "1\n"
    return process


def test_numbers_count_up_and_the_record_says_who_and_what(store):
    assert newest_attempt(store, "r") == 0
    assert [take(store).number for _ in range(3)] == [1, 2, 3]
    assert newest_attempt(store, "r") == 3
    record = read_json(store, "r/attempts/000002.json")
    assert record["pid"] == os.getpid()
    assert record["flow_run_id"] == "f"
    assert record["changed"] == {"a": 1}
    assert record["versions"]["python"] == platform.python_version()
    assert set(record["versions"]) == {"python", "rlhf-flows", "torch", "ray", "prefect", "vllm"}


def test_each_number_is_taken_once_by_racing_callers(store):
    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(lambda _: take(store).number, range(8)))
    assert sorted(numbers) == list(range(1, 9))


def test_one_of_two_simultaneous_starts_goes_on_and_the_other_is_refused(local_store, start_python):
    starters = [start_python(STARTER, local_store.url) for _ in range(2)]
    for starter in starters:
        say_go(starter)
    assert sorted(starter.stdout.readline() for starter in starters) == ["1\n", "busy\n"]


def test_a_living_attempt_refuses_a_second_start_unless_it_takes_over(local_store, start_python):
    first = started(start_python, local_store)
    with pytest.raises(RunBusyError) as refusal:
        take(local_store)
    assert f"alive as process {first.pid}" in str(refusal.value)
    assert "--takeover" in str(refusal.value)
    assert "takeover=True" in str(refusal.value)
    assert newest_attempt(local_store, "r") == 1
    assert take(local_store, takeover=True).number == 2


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_attempt_is_followed_without_asking(local_store, start_python, reaped):
    first = started(start_python, local_store)
    first.send_signal(signal.SIGKILL)
    if reaped:
        first.wait()
    else:
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    assert take(local_store).number == 2


def test_an_attempt_that_has_ended_is_followed_though_its_process_lives(local_store, start_python):
    started(start_python, local_store)
    end_attempt(local_store, "r", 1, "completed")
    assert read_json(local_store, "r/attempts/000001.ended.json")["outcome"] == "completed"
    assert take(local_store).number == 2


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"process_started_s": 1.0}])
def test_a_process_on_another_host_or_a_recycled_pid_refuses_nobody(
    local_store, start_python, change
):
    started(start_python, local_store)
    record = read_json(local_store, "r/attempts/000001.json")
    commit_json(local_store, "other/attempts/000001.json", record | change)
    assert take_attempt(local_store, "other", flow_run_id=None, changed={}).number == 2
    commit_json(local_store, "same/attempts/000001.json", record)
    with pytest.raises(RunBusyError):
        take_attempt(local_store, "same", flow_run_id=None, changed={})


def test_an_older_attempt_is_fenced_and_the_newest_is_not(store):
    take(store)
    check_fence(store, "r", 1)
    take(store)
    check_fence(store, "r", 2)
    with pytest.raises(
        FencedError, match="attempt 1 of run 'r' was replaced by attempt 2"
    ) as error:
        check_fence(store, "r", 1)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_the_first_outcome_of_an_attempt_stands(local_store):
    take(local_store)
    end_attempt(local_store, "r", 1, "fenced")
    end_attempt(local_store, "r", 1, "completed")
    key = RunLayout("r").attempt_ended(1)
    assert read_json(local_store, key)["outcome"] == "fenced"


def test_an_outcome_that_the_store_refuses_fails_nobody(local_store, caplog):
    take(local_store)
    attempts = local_store.root / "r/attempts"
    attempts.rename(attempts.with_name("elsewhere"))
    attempts.write_bytes(b"a file, in which nothing can be made")
    end_attempt(local_store, "r", 1, "completed")
    assert "that attempt 1 ended (completed) is not recorded: cannot write" in caplog.text


def test_deaths_are_counted_back_to_the_last_attempt_that_ended_in_order(store):
    def follow(*outcomes):
        for outcome in outcomes:
            number = take(store).number
            if outcome:
                end_attempt(store, "r", number, outcome)

    assert deaths_in_a_row(store, "r") == []
    follow(None, "completed", None, "fenced", "terminated")
    assert deaths_in_a_row(store, "r") == [5, 3]
    follow("suspended")
    assert deaths_in_a_row(store, "r") == []


def test_an_attempt_that_is_alive_is_no_death(local_store, start_python):
    first = started(start_python, local_store)
    assert deaths_in_a_row(local_store, "r") == []
    first.kill()
    first.wait()
    assert deaths_in_a_row(local_store, "r") == [1]


def test_a_flow_run_that_prefect_runs_again_replaces_its_own_attempt(local_store, start_python):
    started(start_python, local_store)
    record = read_json(local_store, "r/attempts/000001.json") | {"flow_run_id": "f"}
    commit_json(local_store, "other/attempts/000001.json", record)
    with pytest.raises(RunBusyError):
        take_attempt(local_store, "other", flow_run_id="g", changed={})
    assert take_attempt(local_store, "other", flow_run_id="f", changed={}).number == 2
