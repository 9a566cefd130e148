"""Modules make the dataset that they are told to, without padding, and refuse what does not fit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_flows.attempt.checks import check
from rlhf_flows.data import collate, load_rows, register_dataset
from rlhf_flows.data.dataset_kinds import DATASETS
from rlhf_flows.engines import DPOEngine, SFTEngine
from rlhf_flows.errors import ConfigError, DataError, RlhfFlowsError
from rlhf_flows.generation import GenerationSettings
from rlhf_flows.models.dpo_trainer import DPOTrainer
from rlhf_flows.models.preference_reference import PreferenceReference
from rlhf_flows.models.reward_model import RewardModel
from rlhf_flows.models.reward_trainer import RewardTrainer
from rlhf_flows.models.sft_trainer import SFTTrainer
from rlhf_flows.models.torch_policy import TorchPolicy

LENGTHS = (3, 11, 1, 30, 7)


class Lengths:
    """A row is a number: so many tokens, half of them the prompt."""

    def __init__(self, rows: Any, tokenizer: Any, *, max_tokens: int, token: int = 5) -> None:
        self.rows, self.token = rows, token

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt, response = (torch.full((n,), self.token) for n in self.rows[index]["sizes"])
        return {"prompt_ids": prompt, "response_ids": response, "number": index}


def tokens_through(model: torch.nn.Module) -> list[int]:
    """Filled with the number of positions that each pass of the first layer computes."""
    counts: list[int] = []
    layer = model.get_submodule("model.layers.0.mlp")
    layer.register_forward_hook(lambda _, args, __: counts.append(args[0].shape[:-1].numel()))
    return counts


def ready(made: Any) -> Any:
    made.validate()
    made.setup()
    return made


def batch_of(made: Any, rows: list[Any]) -> dict[str, Any]:
    made.validate_rows(rows)
    dataset = made.build_dataset(rows)
    return collate([dataset[i] for i in range(len(dataset))])


def test_demonstrations_reach_the_loss_without_padding(tiny: Path) -> None:
    made = ready(SFTTrainer(path=tiny, micro_batch_tokens=1 << 20))
    rows = [{"prompt": "p" * n, "answer": "a" * (2 * n)} for n in LENGTHS]
    data = made.prepare_batch(batch_of(made, rows))
    counts = tokens_through(made.model)
    metrics = made.train_step(made.micro_batches(data), 0)
    completion = sum(2 * n + 1 for n in LENGTHS)  # and the end token
    assert metrics["tokens"] == completion
    # The last token of a row predicts nothing, so it need not go through.
    assert sum(LENGTHS) + completion - len(LENGTHS) <= sum(counts) <= sum(LENGTHS) + completion


def test_pairs_reach_the_loss_without_padding_and_their_prompt_once(tiny: Path) -> None:
    rows = [
        {"prompt": "p" * n, "pos_answers": ["b" * n, "c"], "neg_answers": ["d", "e" * n]}
        for n in LENGTHS
    ]
    made = ready(RewardTrainer(path=tiny, micro_batch_tokens=1 << 20))
    data = made.prepare_batch(batch_of(made, rows))
    counts = tokens_through(made.model)
    made.train_step(made.micro_batches(data), 0)
    real = 2 * sum(n + (n + 1) + 2 for n in LENGTHS)  # two pairs of a row
    assert real - 4 * len(LENGTHS) <= sum(counts) <= real


def test_prompts_have_their_own_length(tiny: Path) -> None:
    made = TorchPolicy(path=tiny, generation=GenerationSettings(max_new_tokens=4))
    data = batch_of(made, [{"prompt": "p" * n} for n in LENGTHS])
    assert [len(ids) for ids in data["prompt_ids"]] == list(LENGTHS)


def test_one_of_ones_own_reaches_the_loss_without_padding(tiny: Path) -> None:
    made = ready(SFTTrainer(path=tiny, dataset=Lengths, dataset_args={"token": 9}))
    rows = [{"sizes": [n, n + 1]} for n in LENGTHS]
    data = made.prepare_batch(batch_of(made, rows))
    assert set(torch.cat(list(data["response_ids"])).tolist()) == {9}
    counts = tokens_through(made.model)
    metrics = made.train_step(made.micro_batches(data), 0)
    assert metrics["tokens"] == sum(n + 1 for n in LENGTHS)
    assert sum(counts) <= sum(2 * n + 1 for n in LENGTHS)


def test_a_name_is_resolved_where_the_program_runs(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DATASETS, "_registered", {})
    register_dataset("lengths", Lengths)
    made = SFTTrainer(path=tiny, dataset="lengths")
    DATASETS._registered.clear()  # as in a worker
    travelled = pickle.loads(pickle.dumps(made))
    assert isinstance(travelled.build_dataset([{"sizes": [1, 1]}]), Lengths)
    with pytest.raises(ConfigError, match="unknown dataset 'lengths'"):
        SFTTrainer(path=tiny, dataset="lengths")


def test_every_module_that_makes_a_dataset_takes_one(tiny: Path) -> None:
    kinds: list[Any] = [SFTTrainer, TorchPolicy, RewardTrainer, RewardModel, PreferenceReference]
    for kind in kinds:
        assert isinstance(kind(path=tiny, dataset=Lengths).build_dataset([{}]), Lengths), kind
        with pytest.raises(ConfigError, match="nearest: 'token'"):
            kind(path=tiny, dataset=Lengths, dataset_args={"tokn": 1})
    pairs = RewardTrainer(path=tiny, dataset_args={"max_pairs_per_prompt": 1})
    row = {"prompt": "a", "pos_answers": ["b", "c"], "neg_answers": ["d", "e"]}
    assert len(pairs.build_dataset([row])) == 1


def test_prompts_of_evaluations_may_be_made_otherwise(tiny: Path) -> None:
    policy = TorchPolicy(path=tiny, eval_dataset=Lengths, eval_dataset_args={"token": 3})
    rows = [{"prompt": "a", "sizes": [2, 2]}]
    assert policy.build_dataset(rows)[0]["prompt"] == "a"
    assert policy.build_dataset(rows, is_eval=True)[0]["prompt_ids"].tolist() == [3, 3]
    assert (policy.row_fields(), policy.row_fields(is_eval=True)) == (("prompt",), ())


class Odd(Lengths):
    def __getitem__(self, index: int) -> Any:
        return self.rows[index]["item"]


IDS = torch.tensor([5, 6])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([1], r"item 0 of Odd is a list, expected a dict of columns with prompt_ids, response_ids"),
        (
            {"prompt_ids": IDS, "respons_ids": IDS},
            r"item 0 of Odd has no 'response_ids' \(nearest: 'respons_ids'\)",
        ),
        ({"prompt_ids": [5], "response_ids": IDS}, "has a list under 'prompt_ids': give a 1-D"),
        ({"prompt_ids": IDS[None], "response_ids": IDS}, r"a tensor of shape \[1, 2\]"),
        ({"prompt_ids": IDS, "response_ids": IDS[:0]}, "no tokens under 'response_ids'"),
        ({"prompt_ids": IDS.repeat(300), "response_ids": IDS}, "has 602 tokens, the limit is 512"),
    ],
)
def test_items_that_do_not_fit_are_refused_before_anything_starts(
    tiny: Path, item: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        SFTTrainer(path=tiny, dataset=Odd).validate_rows([{"item": item}])


def test_what_ones_own_raises_is_reported_with_its_row(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"sizes": [1, 2]}\n\n{"size": [1, 2]}\n')
    rows = load_rows(path, fields=())
    made = SFTTrainer(path=tiny, dataset=Lengths)
    with pytest.raises(DataError, match=r"item 1 of Lengths .*TypeError.*rows\.jsonl, line 3"):
        made.validate_rows(rows)
    policy = TorchPolicy(path=tiny, dataset=Lengths)
    with pytest.raises(DataError, match="'response_ids', which the run itself writes"):
        policy.validate_rows(rows[:1])


LONG = "x" * 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"prompt": "a", "awnser": "b"}',
            r"line 2 .*did you mean 'answer' where it says 'awnser'",
        ),
        ('{"promt": "a", "answer": "b"}', "line 2: 'prompt' is missing: rename 'promt'"),
        ('{"prompt": "' + LONG + '", "answer": "b"}', "line 2 has 600 tokens, the limit is 512"),
        ('{"prompt": "a", "answer": "' + LONG + '"}', "line 2 has 602 tokens"),
        ('{"prompt": "a", "answer": 4}', "column 'answer' is text in .*line 1 and a number in .*2"),
        ('{"prompt": "a", "answer": "b", "id": 7}', "line 2 has the id 7 of .*line 1"),
        ('{"prompt": "a", "answer": "\xff"}', r"line 2: byte 27 \(0xff\) is not UTF-8"),
    ],
)
def test_files_of_demonstrations_that_misbehave_are_named_with_their_line(
    tiny: Path, tmp_path: Path, text: str, message: str
) -> None:
    assert "rows.jsonl" in _refused(
        SFTEngine(SFTTrainer(path=tiny)),
        tmp_path,
        '{"prompt": "a", "answer": "b", "id": 7}\n' + text,
        message,
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "b", "rejectd": "c"}, "line 2.* did you mean 'rejected' where it says"),
        ({"pos_answers": ["b"], "neg_answer": ["c"]}, "line 2 .* did you mean 'neg_answers'"),
        (
            {"pos_answers": ["b", "c"], "neg_answers": ["d"]},
            "line 2 has 2 pos_answers and 1 neg_answers",
        ),
        ({"chosen": LONG, "rejected": "c"}, r"pair 1 \(.*line 2\) has 602 tokens"),
    ],
)
def test_files_of_pairs_that_misbehave_are_named_with_their_line(
    tiny: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    good = {"prompt": "a", "pos_answers": ["b"], "neg_answers": ["c"]}
    if "chosen" in row:
        good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    text = json.dumps(good) + "\n" + json.dumps({"prompt": "a", **row})
    engine = DPOEngine(PreferenceReference(path=tiny), DPOTrainer(path=tiny))
    assert "rows.jsonl" in _refused(engine, tmp_path, text, message)


def test_an_empty_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    _refused(SFTEngine(SFTTrainer(path=tiny)), tmp_path, "", r"rows\.jsonl holds no rows")


def _refused(engine: Any, folder: Path, text: str, message: str) -> str:
    """What the engine's check says of a file with this text."""
    path = folder / "rows.jsonl"
    path.write_bytes(text.encode("latin-1"))
    engine.set_dataset(str(path))
    with pytest.raises(RlhfFlowsError, match=message) as raised:
        check(engine._describe())
    return str(raised.value)
