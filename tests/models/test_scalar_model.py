"""Scores of the shared-prefix pass are those of plain transformers, in every architecture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_flows.errors import ConfigError
from rlhf_flows.models.causal_lm import made_ready
from rlhf_flows.models.families import family_of
from rlhf_flows.models.response_logprobs import Layout
from rlhf_flows.models.scalar_model import (
    check_scalar_folder,
    last_scores,
    load_scalar_model,
    response_scores,
)
from rlhf_flows.models.shared_prefix import ATTENTION
from rlhf_flows.models.value_model import ValueModel

V = 61
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "num_labels": 1,
}


ARCHITECTURES = {
    "GemmaForCausalLM": {},
    "GPT2LMHeadModel": {},
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
}


def make(architecture: str, **more: Any) -> Any:
    torch.manual_seed(0)
    scalar = getattr(transformers, family_of(architecture).scalar)
    model = scalar(scalar.config_class(**{**SHAPE, **ARCHITECTURES[architecture], **more}))
    model.set_attn_implementation(ATTENTION)
    return model.eval()


def ragged_samples() -> tuple[list[Tensor], list[Tensor], list[int]]:
    g = torch.Generator().manual_seed(1)
    prompts, responses, groups = [], [], []
    for group, (p, lengths) in enumerate([(3, [4, 1, 7]), (9, [2, 2]), (1, [5, 3]), (4, [7])]):
        prompt = torch.randint(1, V, (p,), generator=g)
        for r in lengths:
            prompts.append(prompt)
            responses.append(torch.randint(1, V, (r,), generator=g))
            groups.append(group)
    return prompts, responses, groups


def one_by_one(model: Any, prompts: list[Tensor], responses: list[Tensor]) -> list[Tensor]:
    """Plain transformers, eager attention: the score at every token, one sequence at a time."""
    model.set_attn_implementation("eager")
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        hidden = model.base_model(torch.cat([prompt, response])[None]).last_hidden_state[0]
        found.append(model.score(hidden)[len(prompt) - 1 :, 0])
    model.set_attn_implementation(ATTENTION)
    return found


def gradients(model: Any, scores: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(len(scores), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    (weights * scores).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_scores_and_gradients_are_those_of_one_sequence_at_a_time(
    architecture: str, layout: Layout
) -> None:
    model = make(architecture)
    prompts, responses, groups = ragged_samples()
    plain = one_by_one(model, prompts, responses)
    expected = torch.cat([scores[:-1] for scores in plain])
    expected_gradients = gradients(model, expected)
    made_ready(model, device="cpu", gradient_checkpointing=False)
    got = response_scores(model, prompts, responses, groups, layout=layout)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients(model, got).items():
        want = expected_gradients[name]
        atol = 2e-5 * max(float(want.abs().max()), 1.0)
        torch.testing.assert_close(gradient, want, atol=atol, rtol=1e-4, msg=name)
    last = last_scores(model, prompts, responses, groups, layout=layout)
    ends = torch.stack([scores[-1] for scores in plain])
    torch.testing.assert_close(last, ends, atol=1e-5, rtol=1e-5)


def test_sequences_beyond_a_sliding_window_are_scored_with_the_window() -> None:
    model = make("MistralForCausalLM", sliding_window=4)
    prompts, responses, groups = ragged_samples()
    expected = torch.cat([scores[:-1] for scores in one_by_one(model, prompts, responses)])
    got = response_scores(model, prompts, responses, groups)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_last_score_is_what_transformers_classifies_by(tiny: Path, tmp_path: Path) -> None:
    model = load_scalar_model(tiny, head_init="small")
    model.save_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    prompts, responses, groups = ragged_samples()
    rows = [torch.cat([p, r]) for p, r in zip(prompts, responses, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # padding is token 0
    logits = theirs(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, 0]
    got = last_scores(model, prompts, responses, groups)
    torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-5)


def test_a_new_head_is_the_same_wherever_it_is_made(tiny: Path) -> None:
    torch.manual_seed(1)
    first = load_scalar_model(tiny, head_init="small").score.weight
    torch.manual_seed(2)
    assert torch.equal(load_scalar_model(tiny, head_init="small").score.weight, first)
    assert float(first.detach().std()) == pytest.approx(1 / 65**0.5, rel=0.2)
    assert not load_scalar_model(tiny, head_init="zero").score.weight.any()


def test_a_head_that_is_there_is_kept(tiny: Path, tmp_path: Path) -> None:
    model = load_scalar_model(tiny, head_init="small")
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    check_scalar_folder(tmp_path)
    again = load_scalar_model(tmp_path, head_init="zero")
    assert torch.equal(again.score.weight, model.score.weight)


def test_folders_that_hold_no_scalar_model_are_refused(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())

    def with_config(**more: Any) -> Path:
        (folder / "config.json").write_text(json.dumps({**config, **more}))
        return folder

    three = {"0": "a", "1": "b", "2": "c"}
    name = "Qwen2ForSequenceClassification"
    with pytest.raises(ConfigError, match="has 3 labels, expected 1"):
        ValueModel(path=with_config(architectures=[name], id2label=three)).validate()
    with pytest.raises(ConfigError, match="has 2 labels, expected 1"):
        check_scalar_folder(with_config(architectures=[name]))
    with pytest.raises(ConfigError, match=r"is a BertModel, of no family .*gemma.*register_family"):
        check_scalar_folder(with_config(architectures=["BertModel"]))
    ValueModel(path=with_config()).validate()
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match="has no weights"):
        ValueModel(path=folder).validate()
