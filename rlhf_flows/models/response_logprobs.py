"""Logprobs of responses under a causal model, and the pass below them: the one that policies,
references, supervised training and models with a scalar head share.

Letters: B samples, T response tokens of all samples, flat, in sample order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_flows.errors import ConfigError, DataError
from rlhf_flows.models.families import family_of
from rlhf_flows.models.logprob_head import ScoredTokens, selected_logprobs
from rlhf_flows.models.shared_prefix import SharedPrefixLayout, build_layout
from rlhf_flows.modules.packed_attention import flash_kernel

__all__ = [
    "Layout",
    "chosen_layout",
    "padded_hidden",
    "padded_logprobs",
    "response_logprobs",
    "shared_prefix_hidden",
    "siblings_of",
    "window_of",
]

Layout = Literal["auto", "shared_prefix", "padded"]


def response_logprobs(
    model: Any,
    prompts: Sequence[Tensor],  # B of [p]
    responses: Sequence[Tensor],  # B of [r]
    groups: Sequence[int] | None = None,  # B: neighbours of equal group share their prompt
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    layout: Layout = "auto",
) -> ScoredTokens:
    """Logprob of every response token at `temperature`, flat in sample order.

    `model` was loaded by `load_causal_lm`. "auto" takes the shared-prefix layout, except for
    batches longer than the model's sliding window, whose masks only the padded one knows.
    """
    if chosen_layout(model, prompts, responses, layout) == "padded":
        return padded_logprobs(model, prompts, responses, temperature=temperature, entropy=entropy)
    hidden, plan = shared_prefix_hidden(model, prompts, responses, groups)
    head = model.get_output_embeddings().weight
    scored = selected_logprobs(
        hidden,
        head,
        plan.score_rows,
        plan.score_targets,
        temperature=temperature,
        entropy=entropy,
    )
    return ScoredTokens(
        logprobs=scored.logprobs.index_select(0, plan.sample_order),
        entropy=None if scored.entropy is None else scored.entropy[plan.sample_order],
    )


def padded_logprobs(
    model: Any,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> ScoredTokens:
    """The same by one padded row per sample: for sliding windows, and to compare with."""
    hidden = padded_hidden(model, prompts, responses)
    return selected_logprobs(
        hidden,
        model.get_output_embeddings().weight,
        torch.arange(len(hidden), device=hidden.device),
        torch.cat(list(responses)).to(hidden.device),
        temperature=temperature,
        entropy=entropy,
    )


def chosen_layout(
    model: Any, prompts: Sequence[Tensor], responses: Sequence[Tensor], layout: Layout
) -> Layout:
    """What "auto" means for this batch, and whether the layout that was asked for can take it.

    Raises:
        ConfigError: the shared-prefix layout was asked for, and would not be exact.
        DataError: a text is longer than the model's table of positions.
    """
    family = family_of(type(model).__name__)
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    # The last token of a text predicts nothing, so it has no place.
    if family.learned_positions and longest - 1 > model.config.max_position_embeddings:
        raise DataError(
            f"a text has {longest} tokens, prompt and response together, and this"
            f" {type(model).__name__} has {model.config.max_position_embeddings} positions: leave"
            " longer texts out, or lower max_new_tokens"
        )
    window = window_of(model.config)
    if family.shared_prefix and longest <= window:
        return "shared_prefix" if layout == "auto" else layout
    if layout == "shared_prefix":
        why = (
            f"a text of {longest} tokens is longer than the model's sliding window of {window:g}"
            if family.shared_prefix
            else f"models of the family {family.name!r} are not exact there"
        )
        raise ConfigError(f"the layout 'shared_prefix' was asked for, but {why}: use 'auto'")
    return "padded"


def shared_prefix_hidden(
    model: Any,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    groups: Sequence[int] | None,
) -> tuple[Tensor, SharedPrefixLayout]:  # [U, D]
    """States that something is predicted from, in one row without padding, and which is whose:
    response token t has that of row `score_rows[sample_order[t]]`.
    """
    siblings = siblings_of(prompts, groups)
    starts = [sum(siblings[:i]) for i in range(len(siblings))]
    plan = build_layout(
        [prompts[i] for i in starts],
        responses,
        siblings,
        dtype=model.dtype,
        device=model.device,
        packed=flash_kernel(model.device, model.dtype, _head_width(model.config)) is not None,
    )
    hidden = model.get_decoder()(
        input_ids=plan.input_ids,
        position_ids=plan.position_ids,
        # Any mask of four dimensions is passed on as it is; the layout's attention ignores it.
        attention_mask=torch.empty(1, 1, 1, 1, device=model.device),
        use_cache=False,
        layout=plan,
    ).last_hidden_state[0]
    return plan.scored_hidden(hidden), plan


def _head_width(config: Any) -> int:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(width)


def padded_hidden(
    model: Any, prompts: Sequence[Tensor], responses: Sequence[Tensor]
) -> Tensor:  # [T, D]
    """The state before each response token, from one padded row per sample."""
    rows = [torch.cat([p, r[:-1]]) for p, r in zip(prompts, responses, strict=True)]
    lengths = torch.tensor([len(x) for x in rows])
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    longest = input_ids.shape[1]
    mask = torch.arange(longest) < lengths[:, None]
    hidden: Tensor = model.get_decoder()(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        use_cache=False,
    ).last_hidden_state  # [B, longest, D]
    chosen = torch.cat(
        [
            torch.arange(len(r)) + (i * longest + len(p) - 1)
            for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
        ]
    )
    return hidden.flatten(0, 1).index_select(0, chosen.to(model.device))


def siblings_of(prompts: Sequence[Tensor], groups: Sequence[int] | None) -> list[int]:
    """How many neighbouring samples share each prompt: equal group and equal tokens."""
    siblings: list[int] = []
    for i, prompt in enumerate(prompts):
        if (
            groups is not None
            and i > 0
            and groups[i] == groups[i - 1]
            and (prompt is prompts[i - 1] or torch.equal(prompt, prompts[i - 1]))
        ):
            siblings[-1] += 1
        else:
            siblings.append(1)
    return siblings


def window_of(config: Any) -> float:
    """Longest sequence for which every layer sees everything; infinite without sliding windows."""
    window = getattr(config, "sliding_window", None)
    if window is None:
        return float("inf")
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return float("inf")
    return float(window)
