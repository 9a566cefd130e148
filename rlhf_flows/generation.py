"""How completions are sampled (`GenerationSettings`), and what one sampled completion is.

Shared by every sampler, so that a policy generates by the same rules on vLLM and on transformers.
The decision here: only settings under which the behaviour log-probability of a token is a function
of the model's logits at its position. Penalties on repetition, which depend on the whole text, are
left out: no trainer could recompute what they do. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from rlhf_flows.errors import DataError
from rlhf_flows.settings import Settings

__all__ = ["Completion", "FinishReason", "GenerationSettings", "check_request", "cut_at_stop"]

FinishReason = Literal["stop", "length"]
"""`stop`: the model ended it (an end token, a stop string). `length`: the limit of tokens did."""


class GenerationSettings(Settings):
    """Sampling parameters of one kind of generation (training rollouts, or evaluation)."""

    form_first: ClassVar[tuple[str, ...]] = ("max_new_tokens", "temperature", "top_p")

    max_new_tokens: int = Field(
        default=256,
        ge=1,
        title="Longest completion (tokens)",
        description="Longest completion, in tokens, the end token included.",
    )
    temperature: float = Field(
        default=1.0,
        ge=0.0,
        le=2.0,
        description="Randomness of sampling: what the logits are divided by, from 0.01 to 2; 0"
        " always takes the likeliest token.",
    )
    top_p: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Samples from the smallest set of tokens with this probability.",
    )
    top_k: int = Field(
        default=0,
        ge=0,
        description="Samples from this many most likely tokens; 0 takes all.",
    )
    min_p: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="Leaves out tokens less likely than this times the most likely one.",
    )
    stop: tuple[str, ...] = Field(
        default=(),
        description="Strings that end a completion; its text is cut before the first one.",
    )
    stop_token_ids: tuple[int, ...] = Field(
        default=(), description="Tokens that end a completion, beside the model's end tokens."
    )
    ignore_eos: bool = Field(
        default=False, description="Goes on after the model's end tokens (for benchmarks)."
    )

    @field_validator("temperature")
    @classmethod
    def _not_nearly_zero(cls, value: float) -> float:
        if 0.0 < value < 0.01:
            raise ValueError(f"{value} is below 0.01, which vLLM would raise it to: use 0 or 0.01")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_string_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _no_empty_stop_string(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty stop string would end every completion at once: remove it")
        return value

    @field_validator("stop_token_ids")
    @classmethod
    def _token_ids_are_not_negative(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(i < 0 for i in value):
            raise ValueError(f"token ids count from 0, found {min(value)}")
        return value

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled completion, as token ids."""

    ids: Sequence[int]
    """The tokens, with the end token that stopped it."""
    logprobs: Sequence[float]
    """Of each token under the distribution it was drawn from: after temperature and truncation."""
    finish_reason: FinishReason


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` before the first occurrence of any of the stop strings."""
    return text[: min((i for s in stop if (i := text.find(s)) >= 0), default=len(text))]


def check_request(
    prompt_ids: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    settings: GenerationSettings,
    max_model_len: int,
    module: str,
) -> None:
    """Raises DataError for an empty prompt, one too long for what is asked, or a missing seed."""
    if len(prompt_ids) != len(seeds):
        raise DataError(
            f"module {module!r} got {len(prompt_ids)} prompts and {len(seeds)} seeds: give one"
            " seed for each prompt"
        )
    room = max_model_len - settings.max_new_tokens
    for row, ids in enumerate(prompt_ids):
        if not 1 <= len(ids) <= room:
            raise DataError(
                f"prompt {row} of {len(prompt_ids)} has {len(ids)} tokens, but module"
                f" {module!r} takes 1 to {room} (max_model_len {max_model_len} less"
                f" max_new_tokens {settings.max_new_tokens}): raise max_model_len, lower"
                " max_new_tokens, or leave the prompt out"
            )
