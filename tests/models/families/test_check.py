"""Every family of this package keeps its promises, and one that does not is found out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_flows import Family, check_family, register_family
from rlhf_flows.errors import ConfigError
from rlhf_flows.models.causal_lm import load_causal_lm
from rlhf_flows.models.families import known_families, registered_families
from rlhf_flows.models.families.mixtral import MixtralExperts
from rlhf_flows.models.response_logprobs import chosen_layout
from tests.models.families.tiny_families import EXPERTS, SIZES, VARIANTS, build

BARE = {name: size for name, size in SIZES.items() if name != "head_dim"}


def test_every_family_is_tried() -> None:
    own = {family.name for family in known_families()} - registered_families().keys()
    assert {name.partition(",")[0] for name in VARIANTS} == own


def test_logprobs_scores_gradients_and_weights_are_those_of_transformers(variant: Path) -> None:
    report = check_family(variant, tolerance=2e-5)
    compared = [name.partition(" at ")[0] for name in report.differences]
    assert sorted(compared) == sorted(
        f"{part}{what} ({layout})"
        for part in ("", "gradients of ")
        for what in ("logprobs", "scores")
        for layout in ("shared_prefix", "padded")
    )


@pytest.mark.usefixtures("forgotten")
def test_a_model_that_loses_the_layout_on_its_way_is_found_out_and_can_be_padded(
    tmp_path: Path,
) -> None:
    # Its layers hand no keywords of the call on to attention.
    folder = build(tmp_path, "StableLmForCausalLM", BARE)
    promise = Family(
        name="stablelm",
        causal="StableLmForCausalLM",
        scalar="StableLmForSequenceClassification",
    )
    register_family(promise)
    with pytest.raises(ConfigError) as found:
        check_family(folder)
    assert "logprobs (shared_prefix) differ" in str(found.value)
    assert "gradients of scores (shared_prefix)" in str(found.value)
    assert "(padded)" not in str(found.value)
    assert "shared_prefix=False" in str(found.value)

    register_family(Family(**{**vars(promise), "shared_prefix": False}))
    report = check_family(folder, tolerance=2e-5)
    assert {name.partition(" (")[2].partition(")")[0] for name in report.differences} == {"padded"}


@pytest.mark.usefixtures("forgotten")
def test_a_head_with_more_than_a_matrix_is_found_out(tmp_path: Path) -> None:
    register_family(Family(name="gemma2", causal="Gemma2ForCausalLM"))
    folder = build(tmp_path, "Gemma2ForCausalLM", {**SIZES, "final_logit_softcapping": 1.0})
    with pytest.raises(ConfigError, match=r"; logprobs \(padded\) differ"):
        check_family(folder)


@pytest.mark.usefixtures("forgotten")
def test_weights_that_are_stored_otherwise_are_found_out(tmp_path: Path) -> None:
    register_family(Family(name="qwen3_moe", causal="Qwen3MoeForCausalLM"))
    sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    folder = build(tmp_path, "Qwen3MoeForCausalLM", sizes)
    with pytest.raises(ConfigError, match=r"names or shapes.*missing.*gate_up_proj"):
        check_family(folder)


@pytest.mark.usefixtures("forgotten")
def test_a_conversion_that_does_not_return_is_found_out(tmp_path: Path) -> None:
    class Swapped(MixtralExperts):
        """Takes the up projection for the gate on the way back."""

        def merge(self, name, parts):
            pairs = list(zip(parts[::2], parts[1::2], strict=True)) if "gate_up" in name else []
            return super().merge(name, [w for pair in pairs for w in pair[::-1]] or parts)

    # MiniMax's checkpoints are like Mixtral's.
    register_family(
        Family(
            name="minimax_m2",
            causal="MiniMaxM2ForCausalLM",
            conversions={"transformers": Swapped},
        )
    )
    folder = build(tmp_path, "MiniMaxM2ForCausalLM", {**SIZES, **EXPERTS})
    with pytest.raises(ConfigError, match=r"2 weights are others after sending them"):
        check_family(folder)


@pytest.mark.usefixtures("forgotten")
def test_a_layout_that_is_not_exact_is_not_taken_and_cannot_be_asked_for(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = build(tmp_path, "StableLmForCausalLM", BARE)
    register_family(Family(name="stablelm", causal="StableLmForCausalLM", shared_prefix=False))
    model = load_causal_lm(folder)
    texts = [torch.arange(3)], [torch.arange(4)]
    assert chosen_layout(model, *texts, "auto") == "padded"
    with pytest.raises(ConfigError, match=r"'stablelm' are not exact there: use 'auto'"):
        chosen_layout(model, *texts, "shared_prefix")
    assert chosen_layout(load_causal_lm(folder_of("llama")), *texts, "auto") == "shared_prefix"
