"""The names of the columns that the system itself writes: `docs/columns.md` as data.

The decision here: the table is published and versioned, because analysts query it and later
versions resume from it. A test holds that the page and this file say the same.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COLUMNS", "COLUMNS_VERSION", "GENERATED_COLUMNS", "Column"]

COLUMNS_VERSION = 1
"""Goes up when a column changes its name, type or meaning; a new column does not raise it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    name: str
    dtype: str
    """"str", or a torch dtype; ragged columns hold one 1-D tensor for each sample."""
    ragged: bool
    phase: str
    """Which phase writes it first: plan, rollout, scoring or training."""
    meaning: str


def _column(name: str, dtype: str, phase: str, meaning: str, *, ragged: bool = False) -> Column:
    return Column(name=name, dtype=dtype, ragged=ragged, phase=phase, meaning=meaning)


COLUMNS: tuple[Column, ...] = (
    _column(
        "sample_id", "str", "plan", "episode, dataset row and sibling, such as e000003-r000012-s02"
    ),
    _column("group", "int64", "plan", "position of the prompt in the episode; siblings share it"),
    _column("sibling", "int64", "plan", "position of the sample in its group, from 0"),
    _column("prompt_row", "int64", "plan", "row of the prompt dataset, from 0"),
    _column("seed", "int64", "plan", "seed of the sampler for this sample"),
    _column("policy_version", "int64", "rollout", "policy version that generated the sample"),
    _column("prompt", "str", "rollout", "the prompt as the model saw it, template applied"),
    _column("prompt_ids", "int64", "rollout", "tokens of the prompt", ragged=True),
    _column("completion", "str", "rollout", "text that the policy generated"),
    _column("response_ids", "int64", "rollout", "tokens that the policy generated", ragged=True),
    _column(
        "behaviour_logprobs",
        "float32",
        "rollout",
        "one for each response token: log-probability under the sampling distribution, "
        "temperature included",
        ragged=True,
    ),
    _column("finish_reason", "str", "rollout", "stop, or length for a truncated completion"),
    _column("reward", "float32", "scoring", "reward of the whole sample"),
    _column("reward_failure", "str", "scoring", "why the reward failed; null where it did not"),
    _column("reward_failed", "bool", "scoring", "whether it did, with on_failure=score"),
    _column(
        "reference_logprobs",
        "float32",
        "scoring",
        "one for each response token: log-probability under the frozen model",
        ragged=True,
    ),
    _column(
        "values",
        "float32",
        "scoring",
        "one for each response token: what the value model expects before it",
        ragged=True,
    ),
    _column(
        "normalized_values",
        "float32",
        "scoring",
        "with value_norm, one for each response token: the values on the scale the model learns",
        ragged=True,
    ),
    _column(
        "last_value",
        "float32",
        "scoring",
        "with bootstrap_truncated: what the value model expects after the last token",
    ),
    _column(
        "reference_chosen_logprob",
        "float32",
        "scoring",
        "of the better completion of a pair: log-probability of all its tokens under the frozen "
        "model",
    ),
    _column(
        "reference_rejected_logprob",
        "float32",
        "scoring",
        "the same of the worse completion",
    ),
    _column(
        "old_logprobs",
        "float32",
        "training",
        "one for each response token: log-probability under the trainer's policy when the "
        "training phase began",
        ragged=True,
    ),
)

GENERATED_COLUMNS: frozenset[str] = frozenset(c.name for c in COLUMNS) - {"prompt"}
"""What a user's prompt file may not name its own columns: the run would write over them."""
