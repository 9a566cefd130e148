"""Datasets by name: registered, imported, refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import Dataset

import rlhf_flows
from rlhf_flows import register_dataset
from rlhf_flows.data.dataset_kinds import DATASETS, check_dataset, find_dataset
from rlhf_flows.data.demonstrations import DemonstrationDataset
from rlhf_flows.data.preferences import PreferenceDataset
from rlhf_flows.data.prompts import PromptDataset
from rlhf_flows.errors import ConfigError


class Questions(Dataset[dict[str, Any]]):
    def __init__(self, rows: Any, tokenizer: Any, *, max_tokens: int, question: str = "q") -> None:
        self.rows, self.question = rows, question

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])


class NoItems(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 1


class NoLimit(Questions):
    def __init__(self, rows: Any, tokenizer: Any) -> None: ...


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DATASETS, "_registered", {})


def test_the_kinds_have_reals_names() -> None:
    assert find_dataset("prompt_answer") is DemonstrationDataset
    assert find_dataset("rw_pair") is PreferenceDataset
    assert find_dataset("prompt") is PromptDataset


def test_what_is_registered_is_found_by_name_by_class_and_where_it_is_imported_from() -> None:
    assert register_dataset("questions", Questions) is Questions
    assert find_dataset("questions") is Questions is find_dataset(Questions)
    assert find_dataset("rlhf_flows.data.prompts:PromptDataset") is PromptDataset
    assert rlhf_flows.register_dataset is register_dataset


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("promt_answer", r"unknown dataset 'promt_answer' \(nearest: 'prompt_answer'\)"),
        ("json:Nothing", "json has no 'Nothing'"),
        ("json:loads", "dataset 'json:loads' is a function, expected a class"),
        (NoItems, "NoItems, has no __getitem__: a map-style dataset"),
        (dict[str, int], "expected a class"),
    ],
)
def test_what_is_no_dataset_is_refused(kind: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_dataset(kind)


def test_a_name_of_our_own_or_a_wrong_class_is_not_registered() -> None:
    with pytest.raises(ConfigError, match="'prompt' is one of rlhf_flows' own"):
        register_dataset("prompt", Questions)
    with pytest.raises(ConfigError, match="dataset 'q', NoItems, has no __getitem__"):
        register_dataset("q", NoItems)


@pytest.mark.parametrize(
    ("cls", "args", "message"),
    [
        (Questions, {"qestion": "x"}, r"no argument 'qestion' \(nearest: 'question'\): it takes q"),
        (Questions, {"max_tokens": 3}, "'max_tokens' of dataset Questions is given by the module"),
        (NoLimit, {}, r"NoLimit cannot be made .*called as NoLimit\(rows, tokenizer, max_tokens"),
        (PreferenceDataset, {"max_pairs": 1}, "nearest: 'max_pairs_per_prompt'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(cls: type, args: Any, message: str) -> None:
    check_dataset(Questions, {"question": "x"})
    with pytest.raises(ConfigError, match=message):
        check_dataset(cls, args)
