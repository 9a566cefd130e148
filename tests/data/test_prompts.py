from __future__ import annotations

import io
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_flows.data import (
    PromptDataset,
    collate,
    load_rows,
    prompt_text,
    rows_digest,
    uniform_rows,
)
from rlhf_flows.errors import DataError

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<s>{{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def tokenizer(*, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "2", "+", "=", "user", "assistant", ":"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    made.chat_template = chat_template
    return made


def written(folder: Path, text: str | bytes, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


CHAT = [{"role": "user", "content": "2 + 2 ="}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "2 + 2 =", "answer": 4, "tags": ["a"]},
    {"prompt": "é ≠ e", "answer": 5, "tags": []},
]


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.parquet"])
def test_the_same_rows_come_from_every_kind_of_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        pd.DataFrame(ROWS).to_parquet(path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS) + "\n\n")
    assert load_rows(path) == ROWS
    assert load_rows(path.as_uri()) == ROWS
    assert rows_digest(load_rows(path)) == rows_digest(ROWS)


def test_windows_line_ends_and_a_byte_order_mark_are_taken(tmp_path: Path) -> None:
    path = written(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')
    assert load_rows(path) == [{"prompt": "a"}, {"prompt": "b"}]


def test_a_key_that_only_some_rows_have_is_none_in_the_others(tmp_path: Path) -> None:
    path = written(tmp_path, '{"prompt": "a"}\n{"prompt": "b", "hint": "h"}')
    assert load_rows(path) == [{"prompt": "a", "hint": None}, {"prompt": "b", "hint": "h"}]


def test_ints_among_floats_are_floats_in_every_row() -> None:
    rows = uniform_rows([{"n": 1, "m": 1}, {"n": 0.5, "m": 2}, {"m": None}])
    assert [(type(r["n"]), type(r["m"])) for r in rows[:2]] == [(float, int)] * 2
    assert rows == [{"n": 1, "m": 1}, {"n": 0.5, "m": 2}, {"n": None, "m": None}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('"a": 1}\n{"prompt": "p", "a": "x"}', "'a' is a number in .*line 2 and text in .*line 3"),
        ('"a": true}\n{"prompt": "p", "a": 1}', "'a' is true or false in .* and a number in"),
        ('"a": 9223372036854775808}', "line 2: 'a' is a number beyond 64 bits"),
        ('"a": 0.5}\n{"prompt": "p", "a": 9007199254740993}', "line 3: 'a' is 9007199254740993"),
        ('"a": ' + "1" * 5000 + "}", "line 2: this JSON cannot be read"),
    ],
)
def test_a_column_of_two_types_is_reported_with_a_line_of_each(
    tmp_path: Path, rows: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(written(tmp_path, GOOD + '{"prompt": "p", ' + rows))


def test_credentials_that_are_missing_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(DataError, match=r"s3://b/p\.jsonl cannot be read: .*credentials"):
        load_rows("s3://b/p.jsonl")


GOOD = '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"prompts\.jsonl holds no rows"),
        (" \n\n", r"prompts\.jsonl holds no rows"),
        (GOOD + "\n{'prompt': 1}", r"line 3, column 2: this is not JSON .*'prompt"),
        (GOOD + '{"prompt": "b"', r"line 2, column 15: this is not JSON"),
        (GOOD + '"b"', "line 2: this is text, not an object"),
        (GOOD + "[1]", "line 2: this is a list, not an object"),
        (GOOD.encode() + b'{"prompt": "\xff"}', r"line 2: byte 12 \(0xff\) is not UTF-8"),
        (GOOD + '{"prompt": "\\ud800"}', "line 2: '.ud800' is half of a surrogate pair"),
        (GOOD + '{"promt": "b"}', "line 2: 'prompt' is missing: rename 'promt' to 'prompt'"),
        (GOOD + '{"question": "b"}', "line 2: 'prompt' is missing: it has 'question'"),
        (GOOD + "{}", "line 2: 'prompt' is missing: it has nothing"),
        (GOOD + '{"prompt": null}', "line 2: 'prompt' is null"),
        (GOOD + '{"prompt": ""}', "line 2: the prompt is empty"),
        (GOOD + '{"prompt": 5}', "line 2: the prompt is a number"),
        (GOOD + '{"prompt": []}', "line 2: the prompt is an empty list"),
        (GOOD + '{"prompt": ["b"]}', "line 2: message 0 of the prompt is text"),
        (
            GOOD + '{"prompt": [{"role": "user", "contents": "b"}]}',
            "line 2: message 0 of the prompt: 'content' is missing: rename 'contents'",
        ),
        (
            GOOD + '{"prompt": [{"role": "user", "content": ["b"]}]}',
            "message 0 of the prompt has a list as its 'content'",
        ),
        (
            GOOD + '{"prompt": [{"role": "assistant", "content": "b"}]}',
            "line 2: the last message of the prompt is the assistant's",
        ),
        (GOOD + "[" * 100_000, "line 2.*(nested too deeply|not JSON)"),
    ],
)
def test_a_mistake_is_reported_with_its_line(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(written(tmp_path, text))


def test_a_json_file_that_is_no_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one list of objects; .* name the file \.jsonl"):
        load_rows(written(tmp_path, '{"prompt": "a"}', "p.json"))
    with pytest.raises(DataError, match="line 2, column 1: this is not JSON"):
        load_rows(written(tmp_path, '[{"prompt": "a"},\n', "p.json"))
    with pytest.raises(DataError, match=r"p\.json, row 1: this is a number"):
        load_rows(written(tmp_path, '[{"prompt": "a"}, 3]', "p.json"))


def test_files_that_are_not_there_or_not_prompts_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    with pytest.raises(DataError, match=r"no such file: did you mean .*/prompts\.jsonl"):
        load_rows(path.with_name("prompt.jsonl"))
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load_rows(tmp_path / "nowhere" / "prompts.jsonl")
    with pytest.raises(DataError, match=r"\.jsonl, \.json, \.parquet files, not '\.csv'"):
        load_rows(tmp_path / "prompts.csv")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        load_rows(tmp_path / "folder.json")
    with pytest.raises(DataError, match="no such object"):
        load_rows("memory://bucket/prompts.jsonl")
    with pytest.raises(DataError, match="cannot be read: Protocol not known"):
        load_rows("nosuch://bucket/prompts.jsonl")


def test_parquet_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p\.parquet is no Parquet file"):
        load_rows(written(tmp_path, b"PAR1 and no more", "p.parquet"))
    table = pa.table({"prompt": ["a"], "when": pa.array([0], pa.timestamp("s"))})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    with pytest.raises(DataError, match=r"column 'when' is timestamp\[ms\].*cast it to text"):
        load_rows(written(tmp_path, sink.getvalue(), "p.parquet"))


rows = st.lists(
    st.dictionaries(st.text(max_size=3), st.integers() | st.text() | st.none(), max_size=3),
    max_size=3,
)


@given(rows, rows)
def test_digests_differ_exactly_where_rows_do(one: list[Any], other: list[Any]) -> None:
    assert (rows_digest(one) == rows_digest(other)) == (one == other)


def test_the_digest_is_the_same_for_every_order_of_keys_and_on_every_machine() -> None:
    assert rows_digest([{"a": 1, "b": "é"}]) == rows_digest([{"b": "é", "a": 1}])
    text = b'{"n":1.5,"prompt":"\\u00e9"}\n{"prompt":null}\n'
    assert rows_digest([{"prompt": "é", "n": 1.5}, {"prompt": None}]) == sha256(text).hexdigest()


def test_text_is_taken_as_it_is_and_messages_through_the_template() -> None:
    chat = tokenizer(chat_template=TEMPLATE)
    assert prompt_text({"prompt": "2 + 2 ="}, tokenizer=chat) == "2 + 2 ="
    rendered = "<s>user : 2 + 2 = assistant :"
    assert prompt_text({"prompt": CHAT}, tokenizer=chat) == rendered
    assert prompt_text({"prompt": "2 + 2 ="}, tokenizer=chat, chat_template=True) == rendered


def test_prompts_that_do_not_fit_the_tokenizer_are_refused() -> None:
    plain, chat = tokenizer(), tokenizer(chat_template=TEMPLATE)
    with pytest.raises(DataError, match=r"row 3: .* the model's tokenizer has none"):
        prompt_text({"prompt": CHAT}, tokenizer=plain, where="row 3")
    with pytest.raises(DataError, match="chat_template is false"):
        prompt_text({"prompt": CHAT}, tokenizer=chat, chat_template=False)
    with pytest.raises(DataError, match=r"refuses the messages \(no system role\).*system, user"):
        prompt_text(
            {"prompt": [{"role": "system", "content": "x"}, *CHAT]}, tokenizer=chat, where="row 3"
        )


def test_an_item_holds_text_tokens_and_the_other_columns() -> None:
    dataset = PromptDataset(ROWS, tokenizer(), max_tokens=8)
    assert len(dataset) == 2
    item = dataset[0]
    assert item["prompt_ids"].dtype == torch.int64
    assert item == {
        "prompt": "2 + 2 =",
        "prompt_ids": item["prompt_ids"],
        "answer": 4,
        "tags": ["a"],
    }
    assert item["prompt_ids"].tolist() == [1, 2, 3, 2, 4]
    assert collate([dataset[0], dataset[1]])["answer"].tolist() == [4, 5]
    assert dataset.check() == 5


def test_the_first_token_is_written_once_by_template_or_tokenizer() -> None:
    chat = tokenizer(chat_template=TEMPLATE)
    for rows, template in ([{"prompt": CHAT}], None), ([{"prompt": "2"}], True), (ROWS, None):
        dataset = PromptDataset(rows, chat, max_tokens=20, chat_template=template)
        assert dataset[0]["prompt_ids"].tolist().count(1) == 1


def test_a_prompt_that_is_too_long_is_named_with_its_tokens_and_the_limit() -> None:
    dataset = PromptDataset(ROWS, tokenizer(), max_tokens=4)
    with pytest.raises(DataError, match="prompt of row 0 has 5 tokens, the limit is 4"):
        dataset.check()
    blank = PromptDataset([{"prompt": CHAT}], tokenizer(chat_template="  "), max_tokens=4)
    with pytest.raises(DataError, match="row 0 has no tokens"):
        blank[0]


def test_rows_that_a_run_cannot_use_are_refused_at_the_start() -> None:
    with pytest.raises(DataError, match="row 0 has a column 'reward', which the run itself writes"):
        PromptDataset([{"prompt": "a", "reward": 1}], tokenizer(), max_tokens=4)
    with pytest.raises(DataError, match="without rows"):
        PromptDataset([], tokenizer(), max_tokens=4)
    dataset = PromptDataset(
        [{"prompt": "a", "spans": ()}, {"prompt": "a", "spans": (0, 1)}],
        tokenizer(),
        max_tokens=4,
    )
    with pytest.raises(DataError, match=r"'spans', row 0 holds a builtins\.tuple"):
        dataset.check()


def test_rows_of_supervised_training_may_hold_the_completion() -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    dataset = PromptDataset(rows, tokenizer(), max_tokens=4, reserved=())
    assert dataset[0]["completion"] == "b"
