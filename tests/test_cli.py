"""The command line: each wrong input ends with one paragraph and exit code 2, before Ray starts."""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_flows import cli
from rlhf_flows.errors import ConfigError
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.pools import cluster
from rlhf_flows.reporting.inspection import show_run
from tests.end_to_end.whole_run import toy_engine

REWARDS = """
import math

def good(prompt, completion): return 1.0
def raises(prompt, completion): raise KeyError("no such word")
def nan(prompt, completion): return math.nan
def text(prompt, completion): return "high"
def hangs(completion):
    while True: pass
def short(prompts, completions): return [1.0] * (len(prompts) - 1)
def needs_answer(prompt, completion, answer): return 1.0
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    return build_tiny_qwen2(folder, hidden_size=32, num_layers=1, max_position_embeddings=64)


@pytest.fixture
def place(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder as a user has it, and no way to start Ray."""
    (tmp_path / "rewards_of_test.py").write_text(REWARDS)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "2+2="}\n')
    (tmp_path / "model").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def refuse(*_: object) -> None:
        raise AssertionError("Ray was about to be started")

    monkeypatch.setattr(cluster, "_init", refuse)
    yield tmp_path
    sys.modules.pop("rewards_of_test", None)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit code of `rlhf-flows train grpo ...`, with sensible settings unless `words` say other."""
    settings = {
        "model": "model",
        "prompts": "prompts.jsonl",
        "reward": "rewards_of_test:good",
        "generation.max_new_tokens": "8",
    }
    settings |= dict(word.split("=", 1) for word in words)
    argv = ["rlhf-flows", "train", "grpo", *(f"{k}={v}" for k, v in settings.items())]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


WRONG = {
    "no such folder": (["model=nowhere"], ["nowhere"]),
    "no model in it": (["model=."], ["config.json"]),
    "no such prompts": (["prompts=promts.jsonl"], ["promts.jsonl"]),
    "reward of no form": (["reward=rewards_of_test"], ["package.module:function"]),
    "reward module missing": (["reward=rewards_of_tst:good"], ["rewards_of_tst"]),
    "reward function missing": (["reward=rewards_of_test:god"], ["god", "good"]),
    "reward raises": (["reward=rewards_of_test:raises"], ["KeyError", "no such word", "1+1="]),
    "reward is NaN": (["reward=rewards_of_test:nan"], ["nan", "1+1="]),
    "reward is text": (["reward=rewards_of_test:text"], ["high"]),
    "rewards too few": (["reward=rewards_of_test:short"], ["0", "1"]),
    "reward wants a column": (["reward=rewards_of_test:needs_answer"], ["answer"]),
    "no reward at all": (["reward={}"], ["a reward needs one of function, model, classifier"]),
    "reward field unknown": (["reward={urll: x}"], ["reward.urll", "reward.url"]),
    "reward program missing": (
        ["reward={command: [no-such-program]}"],
        ["no-such-program", "PATH"],
    ),
    "reward program fails": (["reward={command: ['false']}"], ["status 1", "1+1="]),
    "reward service away": (
        ["reward={url: 'http://127.0.0.1:9/', retries: 0, on_failure: score}"],
        ["http://127.0.0.1:9/", "cannot be reached"],
    ),
    "reward is no classifier": (["reward={classifier: model}"], ["Qwen2ForCausalLM"]),
    "reward model missing": (["reward={model: nowhere}"], ["no model folder at", "nowhere"]),
    "reward interface unknown": (["reward={interface: juge}"], ["unknown interface 'juge'"]),
    "reward hangs": (
        ["reward={function: 'rewards_of_test:hangs', timeout_s: 0.2}"],
        ["took longer than 0.2 s", "1+1="],
    ),
    "group of one": (["runtime.num_inference_per_prompt=1"], ["at least 2"]),
    "more tokens than it takes": (["generation.max_new_tokens=64"], ["64", "max_new_tokens"]),
    "prompt too long": (["generation.max_new_tokens=61"], ["prompts.jsonl, line 1", "tokens"]),
    "store not writable": (["store.url=/proc/runs"], ["/proc/runs"]),
    "store of no kind": (["store.url=ftp://x/y"], ["ftp"]),
    "run name escapes": (["run_name=../../elsewhere"], ["../../elsewhere"]),
    "too many CPUs": (["models.policy.num_cpu=512"], ["512", "policy"]),
    "too much memory": (["models.trainer.memory_bytes=9000000000000"], ["memory", "trainer"]),
    "unknown module": (["models.polcy.num_cpu=1"], ["polcy", "policy"]),
    "unknown key": (["runtime.num_epsode=1"], ["runtime.num_episode"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_one_paragraph_and_exit_code_2(
    case: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, says = WRONG[case]
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    flat = " ".join(error.split())
    for word in says:
        assert word in flat, error
    assert not list(place.glob("runs/*/attempts")), "an attempt was taken"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("", "no rows"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2"),
        ('{"prompt": "a"}\n[1]\n', "line 2"),
        ('{"promt": "a"}\n', "prompt"),
        ('{"prompt": 3}\n', "line 1"),
    ],
)
def test_malformed_prompts_are_named_by_line(
    lines: str, says: str, place: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (place / "bad.jsonl").write_text(lines)
    assert run(monkeypatch, "prompts=bad.jsonl") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "bad.jsonl" in error
    assert says in error


def test_an_unsupported_architecture_is_refused_with_those_that_are(
    place: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = place / "bert"
    other.mkdir()
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    (other / "config.json").write_text(json.dumps(config))
    assert run(monkeypatch, "model=bert") == 2
    error = capsys.readouterr().err
    assert "Bert" in error or "bert" in error
    assert "qwen2" in error.lower()


def test_a_run_name_of_another_configuration_is_refused_with_the_difference(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlhf_flows.attempt import check, claim_run
    from rlhf_flows.config_loading import load_config
    from rlhf_flows.deployments import grpo

    words = ["model=model", "prompts=prompts.jsonl", "reward=rewards_of_test:good",
             "generation.max_new_tokens=8", "run_name=mine"]  # fmt: skip
    engine = grpo.build(load_config(grpo.GRPOConfig, words))
    claim_run(check(engine._describe()), "mine")
    assert run(monkeypatch, "run_name=mine", "optimizer.learning_rate=0.5") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "optimizer.learning_rate" in error
    assert "0.5" in error
    assert "run_name" in error

    # A version of this package before these fields were: they say nothing at their defaults.
    file = place / "runs/mine/run.json"
    older = json.loads(file.read_text("utf-8"))
    del older["config"]["runtime"]["stop_if"]
    del older["config"]["runtime"]["num_training_epoch"]
    file.write_text(json.dumps(older))
    claim_run(check(engine._describe()), "mine")
    assert run(monkeypatch, "run_name=mine", "runtime.num_training_epoch=2") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "runtime.num_training_epoch: (absent) then, 2 now" in error


def test_an_unknown_recipe_lists_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rlhf-flows", "train", "ppx"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    said = capsys.readouterr().err.replace("\n", "")
    assert "unknown recipe 'ppx' (nearest: 'ppo'): known are quickstart, sft, reward_model" in said


@pytest.mark.parametrize("command", ["install", "remove", "ls"])
def test_automations_without_a_server_that_stays_say_how_to_have_one(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setattr(sys, "argv", ["rlhf-flows", "automations", command])
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(SystemExit) as caught,
    ):
        cli.main()
    assert caught.value.code == 2
    assert "PREFECT_API_URL" in capsys.readouterr().err


def fails(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit code of `rlhf-flows ...`."""
    monkeypatch.setattr(sys, "argv", ["rlhf-flows", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def nobody_listens() -> Iterator[str]:
    """The address of a Prefect server that is down, as configured."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: url}):
            yield url


@pytest.mark.parametrize("command", ["install", "remove", "ls"])
def test_automations_on_a_server_that_is_down_are_one_paragraph(
    command: str,
    nobody_listens: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fails(monkeypatch, "automations", command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert nobody_listens in error


def test_a_prefect_server_that_is_down_is_known_before_the_run_has_a_name(
    place: Path,
    nobody_listens: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "run_name=mine") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert nobody_listens in error
    assert "prefect server start" in error
    assert not (place / "runs").exists()


def test_a_program_of_ones_own_is_told_of_a_server_that_is_down_before_anything_starts(
    tmp_path: Path, nobody_listens: str
) -> None:
    engine = toy_engine(eval_rows=0)
    with pytest.raises(ConfigError, match=re.escape(nobody_listens)):
        engine.learn(run_name="mine", store={"url": str(tmp_path)})
    assert not list(tmp_path.iterdir())


def test_a_summary_that_cannot_be_written_is_known_before_the_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "grpo", "model=model", "prompts=prompts.jsonl", "reward=rewards_of_test:good"]
    assert fails(monkeypatch, *words, "--json", ".") == 2
    assert "is a folder" in " ".join(capsys.readouterr().err.split())


def test_an_export_to_a_file_is_one_paragraph(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(monkeypatch, "export", "any", "--to", "prompts.jsonl") == 2
    assert "prompts.jsonl is a file" in " ".join(capsys.readouterr().err.split())


def test_show_of_an_episode_whose_phases_have_no_shard_in_common_leaves_its_samples_out(
    tmp_path: Path,
) -> None:
    from rlhf_flows.store import RunLayout, open_run, open_store

    store = open_store(str(tmp_path))
    open_run(store, "r", config={"runtime": {"num_episode": 1}}, may_change=frozenset())
    for phase, index in (("rollout", 0), ("scoring", 1)):
        store.put_if_absent(RunLayout("r").shard(phase, 0, index), b"not looked into")
    titles = [table.title for table in show_run(str(tmp_path), "r", samples=4)]
    assert titles == ["r: episodes"]


def test_show_tells_evaluations_of_a_version_apart_by_their_prompts(tmp_path: Path) -> None:
    from rlhf_flows.store import RunLayout, commit_json, open_run, open_store

    store, layout = open_store(str(tmp_path)), RunLayout("r")
    open_run(store, "r", config={"runtime": {"num_episode": 1}}, may_change=frozenset())
    commit_json(store, layout.evaluation_done(0, "abc"), {"metrics": {"reward": 0.25}})
    _, table = show_run(str(tmp_path), "r", samples=0)
    assert [list(column.cells) for column in table.columns] == [["0"], ["0.2500"]]
    commit_json(store, layout.evaluation_done(0, "def"), {"metrics": {"reward": 0.5}})
    _, table = show_run(str(tmp_path), "r", samples=0)
    rows = [list(column.cells) for column in table.columns]
    assert rows == [["0", "0"], ["abc", "def"], ["0.2500", "0.5000"]]
