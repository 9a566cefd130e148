"""The shared-prefix layout computes what one row per sample computes, in every architecture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf_flows.errors import ConfigError, DataError
from rlhf_flows.models import cpu_attention, shared_prefix
from rlhf_flows.models import response_logprobs as response_logprobs_module
from rlhf_flows.models.families import known_families, registered_families
from rlhf_flows.models.fused_layers import fuse_layers
from rlhf_flows.models.response_logprobs import Layout, response_logprobs, window_of
from rlhf_flows.models.shared_prefix import ATTENTION
from tests.modules.plain_attention import PlainKernel

V = 61
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS = {
    "LlamaForCausalLM": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "Qwen2ForCausalLM": lambda: Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **SHAPE)),
    "Qwen3ForCausalLM": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "MistralForCausalLM": lambda: MistralForCausalLM(MistralConfig(sliding_window=64, **SHAPE)),
    "GemmaForCausalLM": lambda: GemmaForCausalLM(GemmaConfig(**SHAPE)),
    "GPT2LMHeadModel": lambda: GPT2LMHeadModel(GPT2Config(**SHAPE)),
    "MixtralForCausalLM": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SHAPE)),
}


def make(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[architecture]()
    model.set_attn_implementation(ATTENTION)
    return model.eval()


def ragged_samples() -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Five groups of 1 to 4 siblings; prompts of 1 to 9 tokens, responses of 1 to 7."""
    g = torch.Generator().manual_seed(1)
    prompts, responses, groups = [], [], []
    for group, (p, lengths) in enumerate(
        [(3, [4, 1, 7]), (9, [2, 2]), (1, [5, 3, 1, 6]), (4, [7]), (9, [1, 1])]
    ):
        prompt = torch.randint(V, (p,), generator=g)
        for r in lengths:
            prompts.append(prompt)
            responses.append(torch.randint(V, (r,), generator=g))
            groups.append(group)
    return prompts, responses, groups


def even_samples() -> tuple[list[Tensor], list[Tensor], list[int]]:
    g = torch.Generator().manual_seed(2)
    prompts = [torch.randint(V, (5,), generator=g) for _ in range(3)]
    responses = [torch.randint(V, (4,), generator=g) for _ in range(6)]
    return [prompts[i // 2] for i in range(6)], responses, [i // 2 for i in range(6)]


def one_by_one(
    model: PreTrainedModel, prompts: list[Tensor], responses: list[Tensor], temperature: float
) -> Tensor:
    """Plain transformers, eager attention, one sequence at a time."""
    model.set_attn_implementation("eager")
    flat = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(torch.cat([prompt, response])[None], use_cache=False).logits[0].float()
        logprobs = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        flat.append(logprobs.gather(-1, response[:, None])[:, 0])
    model.set_attn_implementation(ATTENTION)
    return torch.cat(flat)


def gradients(model: PreTrainedModel, logprobs: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    (weights * logprobs).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_every_family_is_tested_here() -> None:
    # A program's own, registered by another test, are its own affair.
    own = {f.causal for f in known_families() if f.name not in registered_families()}
    assert own == set(MODELS)


@pytest.mark.parametrize("architecture", sorted(MODELS))
@pytest.mark.parametrize("samples", [ragged_samples, even_samples])
@pytest.mark.parametrize("way", ["products", "fused", "padded", "packed", "fused layers"])
def test_logprobs_and_gradients_are_those_of_one_sequence_at_a_time(
    monkeypatch: pytest.MonkeyPatch, architecture: str, samples, way: str
) -> None:
    layout: Layout = "padded" if way == "padded" else "shared_prefix"
    if way == "fused":
        monkeypatch.setattr(cpu_attention, "MAX_SCORES", 0)
    if way == "packed":  # as on CUDA, by a kernel in plain torch
        for user in (shared_prefix, response_logprobs_module):
            monkeypatch.setattr(user, "flash_kernel", lambda *_: PlainKernel())
    model = make(architecture)
    prompts, responses, groups = samples()
    expected = one_by_one(model, prompts, responses, 0.7)
    expected_gradients = gradients(model, expected)
    if way == "fused layers":
        fuse_layers(model)
    got = response_logprobs(
        model, prompts, responses, groups, temperature=0.7, layout=layout
    ).logprobs
    got_gradients = gradients(model, got)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert got_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            got_gradients[name], gradient, atol=2e-5 * max(scale, 1.0), rtol=1e-4, msg=name
        )


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1)])
def test_products_and_fused_attention_agree_for_any_heads(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    shape = {**SHAPE, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    model.set_attn_implementation(ATTENTION)
    for samples in (ragged_samples(), even_samples()):
        found = []
        for most in (0, 2**24):
            monkeypatch.setattr(cpu_attention, "MAX_SCORES", most)
            found.append(gradients(model, response_logprobs(model, *samples).logprobs))
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_responses_of_one_token_need_no_attention_of_their_own() -> None:
    model = make("LlamaForCausalLM")
    prompts = [torch.tensor([1, 2, 3])] * 2
    responses = [torch.tensor([4]), torch.tensor([5])]
    expected = one_by_one(model, prompts, responses, 1.0)
    got = response_logprobs(model, prompts, responses, [0, 0]).logprobs
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_is_computed_once_for_its_siblings() -> None:
    model = make("LlamaForCausalLM")
    prompts, responses, groups = ragged_samples()
    seen = []
    hook = (
        model.get_decoder()
        .layers[0]
        .register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    )
    response_logprobs(model, prompts, responses, groups)
    hook.remove()
    unique_prompt_tokens = 3 + 9 + 1 + 4 + 9
    assert seen == [unique_prompt_tokens + sum(len(r) - 1 for r in responses)]


def test_neighbours_of_one_group_with_other_prompts_do_not_share_them() -> None:
    model = make("LlamaForCausalLM")
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])]
    responses = [torch.tensor([5, 6]), torch.tensor([5, 6])]
    expected = one_by_one(model, prompts, responses, 1.0)
    got = response_logprobs(model, prompts, responses, [0, 0]).logprobs
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_entropy_is_that_of_the_distribution_each_token_was_drawn_from() -> None:
    model = make("Qwen2ForCausalLM")
    prompts, responses, groups = ragged_samples()
    logits = model(torch.cat([prompts[0], responses[0]])[None]).logits[0, len(prompts[0]) - 1 : -1]
    expected = torch.distributions.Categorical(logits=logits / 0.7).entropy()
    entropy = response_logprobs(
        model, prompts, responses, groups, temperature=0.7, entropy=True
    ).entropy
    assert entropy is not None
    assert not entropy.requires_grad
    torch.testing.assert_close(entropy[: len(responses[0])], expected.detach(), atol=1e-5, rtol=0)


def test_sequences_beyond_a_sliding_window_are_computed_with_the_window() -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(sliding_window=4, **SHAPE))
    model.set_attn_implementation(ATTENTION)
    prompts, responses, groups = ragged_samples()
    assert window_of(model.config) == 4
    expected = one_by_one(model, prompts, responses, 1.0)
    torch.testing.assert_close(
        response_logprobs(model, prompts, responses, groups).logprobs,
        expected,
        atol=1e-5,
        rtol=1e-5,
    )
    with pytest.raises(ConfigError, match=r"11 tokens is longer than.*sliding window of 4"):
        response_logprobs(model, prompts, responses, groups, layout="shared_prefix")


def test_a_text_longer_than_the_table_of_positions_is_refused() -> None:
    model = make("GPT2LMHeadModel")
    last = torch.zeros(129 - 5, dtype=torch.int64)
    fits = response_logprobs(model, [torch.arange(5)], [last]).logprobs
    assert bool(fits.isfinite().all())
    with pytest.raises(DataError, match=r"130 tokens.*128 positions"):
        response_logprobs(model, [torch.arange(6)], [last])


def test_gradient_checkpointing_changes_nothing() -> None:
    model = make("Qwen3ForCausalLM")
    samples = ragged_samples()
    expected = gradients(model, response_logprobs(model, *samples).logprobs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    got = gradients(model, response_logprobs(model, *samples).logprobs)
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


def test_the_same_input_gives_the_same_bits() -> None:
    model = make("LlamaForCausalLM")
    samples = ragged_samples()
    first = gradients(model, response_logprobs(model, *samples).logprobs)
    second = gradients(model, response_logprobs(model, *samples).logprobs)
    for name, gradient in first.items():
        assert torch.equal(second[name], gradient), name
