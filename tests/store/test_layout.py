"""Every key of a run, and back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.errors import ConfigError, StoreError
from rlhf_flows.store import KeyParts, RunLayout, check_run_name, parse_key
from rlhf_flows.store.objects import check_key

numbers = st.integers(min_value=0, max_value=10**8)
positive = st.integers(min_value=1, max_value=10**8)
phases = st.sampled_from(["rollout", "scoring"])
words = st.from_regex(r"[A-Za-z0-9_-]{1,40}", fullmatch=True)
run_names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True)
folders = st.sampled_from(["checkpoint", "weights"])


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/a",
        "a\\b",
        ".hidden",
        "-x",
        "a b",
        "a\n",
        "a\0",
        "é",
        "a" * 129,
    ],
)
def test_a_run_name_that_would_escape_its_folder_or_surprise_a_shell_is_refused(name):
    with pytest.raises(ConfigError, match="a run cannot be named"):
        check_run_name(name)
    with pytest.raises(ConfigError):
        RunLayout(name)


@given(st.text())
def test_whatever_name_is_accepted_is_one_plain_folder(name):
    try:
        check_run_name(name)
    except ConfigError:
        return
    assert check_key(RunLayout(name).run_json) == f"{name}/run.json"
    assert re.fullmatch(r"[!-~]+", name)


def test_the_names_that_people_give_are_accepted():
    for name in (
        "grpo",
        "grpo-0c5a91f2-6c1c-4d0e-8a7e-000000000000",
        "2026-11-22_sort.v2",
        "a" * 128,
    ):
        assert check_run_name(name) == name


def test_keys_are_as_published():
    layout = RunLayout("r")
    assert layout.run_json == "r/run.json"
    assert layout.attempt(4) == "r/attempts/000004.json"
    assert layout.plan(3) == "r/episodes/episode=000003/plan-00.json"
    assert layout.plan(3, 1, 2) == "r/episodes/episode=000003/plan-01.g2.json"
    assert layout.shard("rollout", 3, 7) == "r/episodes/episode=000003/rollout/shard-00007.parquet"
    assert layout.shard("scoring", 3, 7, 1).endswith("/scoring/shard-00007.g1.parquet")
    assert layout.trained(3) == "r/episodes/episode=000003/trained.json"
    assert layout.checkpoint_prefix(4, "uid") == "r/checkpoints/version=000004/uid"
    assert layout.weights_prefix(4, "uid") == "r/weights/version=000004/uid"
    assert layout.evaluation_prefix(4, "d1") == "r/evaluations/version=000004/eval=d1"
    assert layout.evaluation_done(4, "d1") == "r/evaluations/version=000004/eval=d1/done.json"


@given(run=run_names, data=st.data())
def test_a_key_parses_back_to_what_it_was_made_of(run, data):
    layout = RunLayout(run)
    episode, index, generation = data.draw(numbers), data.draw(numbers), data.draw(numbers)
    phase, word, version = data.draw(phases), data.draw(words), data.draw(numbers)
    shard = {"episode": episode, "index": index, "phase": phase, "generation": generation}
    folder = {"version": version, "word": word}
    checkpoint = layout.checkpoint_prefix(version, word)
    for key, parts in (
        (layout.run_json, KeyParts(kind="run")),
        (layout.attempt(index), KeyParts(kind="attempt", number=index)),
        (layout.attempt_ended(index), KeyParts(kind="attempt_ended", number=index)),
        (
            layout.plan(episode, index, generation),
            KeyParts(kind="plan", episode=episode, wave=index, generation=generation),
        ),
        (layout.trained(episode), KeyParts(kind="trained", episode=episode)),
        (
            layout.quarantine(episode, word, generation),
            KeyParts(kind="quarantine", episode=episode, word=word, generation=generation),
        ),
        (layout.shard(phase, episode, index, generation), KeyParts(kind="shard", **shard)),
        (layout.tombstone(phase, episode, index, generation), KeyParts(kind="tombstone", **shard)),
        (f"{checkpoint}/a/b.bin", KeyParts(kind="checkpoint_file", rest="a/b.bin", **folder)),
        (
            f"{layout.weights_prefix(version, word)}/x",
            KeyParts(kind="weights_file", rest="x", **folder),
        ),
        (
            layout.evaluation_shard(version, word, index, generation),
            KeyParts(kind="evaluation_shard", index=index, generation=generation, **folder),
        ),
        (
            layout.evaluation_tombstone(version, word, index, generation),
            KeyParts(kind="evaluation_tombstone", index=index, generation=generation, **folder),
        ),
        (layout.evaluation_done(version, word), KeyParts(kind="evaluation_done", **folder)),
        (
            layout.deleted(checkpoint),
            KeyParts(kind="deleted", rest=checkpoint.removeprefix(f"{run}/"), **folder),
        ),
    ):
        assert parse_key(run, check_key(key)) == parts
        assert parse_key(f"{run}x", key) is None


@given(version=numbers, word=words, run=run_names)
def test_folders_of_weights_say_of_which_version(version, word, run):
    layout = RunLayout(run)
    assert layout.version_of_weights(layout.weights_prefix(version, word)) == version
    assert layout.version_of_weights(layout.checkpoint_prefix(version, word)) is None
    assert RunLayout(f"{run}x").version_of_weights(layout.weights_prefix(version, word)) is None


def test_what_the_layout_does_not_write_is_not_understood():
    for below in (
        "run.json.bak",
        "runxjson",
        "attempts/4.json",
        "attempts/0000004.json",
        "episodes/episode=000003/rollout/shard-00007.g0.parquet",
        "episodes/episode=000003/rollout/shard-00007.parquet.tmp",
        "episodes/episode=000003/training/shard-00007.parquet",
        "episodes/episode=٠٠٠٠٠٣/trained.json",
        "checkpoints/version=000004/uid",
        "",
    ):
        assert parse_key("r", f"r/{below}") is None


@pytest.mark.parametrize("word", ["", "a/b", "..", "a.b", "x y"])
def test_ids_that_would_change_the_shape_of_a_key_are_refused(word):
    layout = RunLayout("r")
    for make in (layout.checkpoint_prefix, layout.evaluation_prefix, layout.quarantine):
        with pytest.raises(StoreError, match="cannot be part of a key"):
            make(1, word)
