from __future__ import annotations

from typing import Any

import pytest

from rlhf_flows.data import PreferenceDataset, collate, pair_rows
from rlhf_flows.errors import ConfigError, DataError
from rlhf_flows.models.tiny import character_tokenizer

ROW = {"prompt": "2+2=", "chosen": "4", "rejected": "five", "source": "school"}


def dataset(rows: list[dict[str, Any]], **options: Any) -> PreferenceDataset:
    return PreferenceDataset(rows, character_tokenizer(), **{"max_tokens": 20, **options})


def test_a_pair_has_its_texts_its_tokens_and_the_rows_other_columns() -> None:
    tokenizer = character_tokenizer()
    item = dataset([ROW])[0]
    assert (item["prompt"], item["chosen"], item["rejected"]) == ("2+2=", "4", "five")
    assert item["source"] == "school"
    assert item["prompt_ids"].tolist() == tokenizer("2+2=")["input_ids"]
    end = [tokenizer.eos_token_id]
    assert item["chosen_ids"].tolist() == tokenizer("4")["input_ids"] + end
    assert item["rejected_ids"].tolist() == tokenizer("five")["input_ids"] + end
    bare = dataset([ROW], append_eos=False)[0]
    assert bare["chosen_ids"].tolist() == tokenizer("4")["input_ids"]
    assert collate([item, item])["source"] == ["school", "school"]


def test_lists_of_answers_are_pairs_one_to_one() -> None:
    rows = [{"prompt": "a", "pos_answers": ["b", "c"], "neg_answers": ["d", "e"], "id": 7}, ROW]
    assert pair_rows(rows) == [
        {"prompt": "a", "id": 7, "chosen": "b", "rejected": "d"},
        {"prompt": "a", "id": 7, "chosen": "c", "rejected": "e"},
        ROW,
    ]
    made = dataset(rows)
    assert len(made) == 3
    assert (made[1]["chosen"], made[1]["rejected"], made[1]["id"]) == ("c", "e", 7)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"pos_answers": ["a"], "neg_answers": ["b", "c"]}, "row 1 has 1 pos_answers and 2 neg"),
        ({"pos_answers": [], "neg_answers": []}, "row 1 needs lists of texts"),
        ({"pos_answers": ["a"]}, "found a list and nothing"),
    ],
)
def test_lists_that_are_no_pairs_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pair_rows([ROW, {"prompt": "a", **row}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "b"}, r"pair 1 needs a text under 'rejected', found nothing among \['chosen'"),
        ({"chosen": 3, "rejected": "c"}, "pair 1 needs a text under 'chosen', found a int"),
    ],
)
def test_rows_that_are_no_pair_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataset([{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", **row}])


def test_pairs_that_do_not_fit_are_refused_with_their_length() -> None:
    with pytest.raises(DataError, match="pair 0 has 9 tokens, prompt and rejected completion"):
        dataset([ROW], max_tokens=8).check()
    with pytest.raises(DataError, match="the chosen completion of pair 0 has no tokens"):
        dataset([{**ROW, "chosen": ""}], append_eos=False)[0]
    with pytest.raises(DataError, match="has a column 'chosen_ids', which the run itself writes"):
        dataset([{**ROW, "chosen_ids": [1]}])


def test_a_row_with_more_pairs_than_are_wanted_is_cut_after_the_first() -> None:
    row = {"prompt": "a", "pos_answers": ["b", "c", "d"], "neg_answers": ["e", "f", "g"]}
    for most, count in ((None, 4), (5, 4), (3, 4), (2, 3), (1, 2)):
        made = dataset([row, ROW], max_pairs_per_prompt=most)
        assert len(made) == count
        assert [made[i]["chosen"] for i in range(count)] == [*["b", "c", "d"][: count - 1], "4"]
        assert [made[i]["rejected"] for i in range(count)] == [
            *["e", "f", "g"][: count - 1],
            "five",
        ]
    with pytest.raises(ConfigError, match="max_pairs_per_prompt is 0: give at least 1"):
        dataset([row], max_pairs_per_prompt=0)
