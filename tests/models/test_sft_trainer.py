from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_flows.data.batch import Batch, collate
from rlhf_flows.errors import ConfigError, DataError
from rlhf_flows.models.causal_lm import check_model_folder, load_causal_lm, load_tokenizer
from rlhf_flows.models.sft_trainer import SFTTrainer
from rlhf_flows.settings import OptimizerSettings, SFTSettings

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(0, 40, 3)]


def trainer(path: Path, **options: Any) -> SFTTrainer:
    options.setdefault("optimizer", OptimizerSettings(learning_rate=1e-2))
    made = SFTTrainer(path=path, **options)
    made.validate()
    made.setup()
    return made


def demonstrations(made: SFTTrainer) -> Batch:
    dataset = made.build_dataset(ROWS)
    return collate([dataset[i] for i in range(len(dataset))])


def test_the_loss_is_the_cross_entropy_of_the_completion_tokens(tiny: Path) -> None:
    made = trainer(tiny)
    data = made.prepare_batch(demonstrations(made))
    losses = []
    for prompt, response in zip(data["prompt_ids"], data["response_ids"], strict=True):
        logits = made.model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, response, reduction="none"))
    expected = float(torch.cat(losses).mean().detach())
    metrics = made.train_step(made.micro_batches(data), 0)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["tokens"] == sum(len(r) for r in data["response_ids"])
    assert metrics["rows_trained"] == len(ROWS)


def test_demonstrations_are_learnt(tiny: Path) -> None:
    settings = OptimizerSettings(
        learning_rate=1e-2, schedule="cosine", warmup_steps=2, total_steps=40
    )
    made = trainer(tiny, optimizer=settings, micro_batch_tokens=64)
    data = made.prepare_batch(demonstrations(made))
    found = [made.train_step(made.micro_batches(data), step) for step in range(40)]
    assert found[-1]["loss"] < 0.3 * found[0]["loss"]
    rates = [m["learning_rate"] for m in found]
    assert rates[:3] == pytest.approx([5e-3, 1e-2, 1e-2])
    assert rates[-1] < 1e-4
    assert made.forward_step(demonstrations(made))["nll"].mean() < 0.3 * found[0]["loss"]


def test_a_completion_ends_with_the_end_token_unless_told_otherwise(tiny: Path) -> None:
    made = trainer(tiny)
    item = made.build_dataset(ROWS)[2]
    assert item["completion"] == "7"
    assert item["response_ids"].tolist() == [
        *made.tokenizer("7")["input_ids"], made.tokenizer.eos_token_id,
    ]  # fmt: skip
    bare = trainer(tiny, sft=SFTSettings(append_eos=False)).build_dataset(ROWS)[2]
    assert bare["response_ids"].tolist() == made.tokenizer("7")["input_ids"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "answer": "b"}, {"prompt": "a", "target": "b"}], "row 1 needs a text"),
        ([{"prompt": "a", "completion": 3}], "found a number among"),
        ([], "without rows"),
    ],
)
def test_rows_without_a_demonstration_are_refused(
    tiny: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        trainer(tiny).build_dataset(rows)


def test_a_row_that_is_too_long_is_refused_with_its_length(tiny: Path) -> None:
    made = trainer(tiny, sft=SFTSettings(max_tokens=5))
    with pytest.raises(DataError, match=r"row 0 has 7 tokens.*limit is 5"):
        made.build_dataset([{"prompt": "abc", "completion": "def"}])[0]


def test_every_row_is_checked_before_anything_is_loaded(tiny: Path) -> None:
    made = SFTTrainer(path=tiny, sft=SFTSettings(max_tokens=6))
    made.validate_rows(ROWS[:3])
    with pytest.raises(DataError, match=r"row 3 has 7 tokens"):
        made.validate_rows([*ROWS[:3], {"prompt": "abc", "completion": "def"}])
    assert made.tokenizer is None


def test_what_was_saved_is_what_transformers_loads(tiny: Path, tmp_path: Path) -> None:
    made = trainer(tiny)
    data = made.prepare_batch(demonstrations(made))
    made.train_step(made.micro_batches(data), 0)
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = dict(loaded.named_parameters())
    for name, tensor in made.named_weights():
        assert torch.equal(theirs[name], tensor), name
    sequence = [5, 9, 30, 31, 7]
    logits = loaded(torch.tensor([sequence])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(sequence)[1:, None])[:, 0]
    (probed,) = made.probe_logprobs([sequence])
    torch.testing.assert_close(torch.tensor(probed), expected.detach(), atol=1e-5, rtol=0)
    assert check_model_folder(tmp_path).max_positions == 512
    assert load_tokenizer(tmp_path)("1+1=")["input_ids"] == made.tokenizer("1+1=")["input_ids"]


def test_a_model_is_loaded_without_dropout(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    model = load_causal_lm(folder).train()
    x = torch.arange(3, 30)[None]
    assert torch.equal(model(x).logits, model(x).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (
            lambda f: (f / "config.json").write_text('{"architectures": ["OPTForCausalLM"]}'),
            r"is a OPTForCausalLM.*known are gemma \(GemmaForCausalLM\), gpt2.*register_family",
        ),
        (lambda f: (f / "model.safetensors").unlink(), r"has no weights \(\*.safetensors\)"),
        (lambda f: [x.unlink() for x in f.glob("tokenizer*")], "has no tokenizer"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_by_what_it_lacks(
    tiny: Path, tmp_path: Path, change: Any, message: str
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    change(folder)
    with pytest.raises(ConfigError, match=message):
        check_model_folder(folder)


def test_weights_that_cannot_be_read_are_an_error_with_the_folder(
    tiny: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_causal_lm(folder)
