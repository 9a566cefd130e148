"""Models with a scalar head: a value, or a reward, from the state at a token.

The decision here: they are `transformers`' own models for sequence classification with one label,
so that a checkpoint is a plain Hugging Face folder which others load. Made from a causal model, the
head is new: zero, or small and the same in every process. One pass without padding, the one that
logprobs take (response_logprobs.py), gives the score before every response token.

Letters: B samples, T response tokens of all samples, flat, in sample order, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import logging

from rlhf_flows.errors import ConfigError
from rlhf_flows.models.causal_lm import (
    DType,
    architecture_of,
    attention_of,
    check_is_whole,
    made_ready,
)
from rlhf_flows.models.families import family_of
from rlhf_flows.models.response_logprobs import (
    Layout,
    chosen_layout,
    padded_hidden,
    shared_prefix_hidden,
)
from rlhf_flows.modules.hf_folder import HFFolder

__all__ = [
    "HeadInit",
    "check_scalar_folder",
    "last_scores",
    "load_scalar_model",
    "make_head",
    "one_longer",
    "response_scores",
    "scalar_config",
]

HeadInit = Literal["zero", "small"]
_HEAD = "score.weight"


def check_scalar_folder(path: str | Path) -> HFFolder:
    """What the folder says of its model: a causal one, or one with a head of one label.

    Raises ConfigError that says what is missing, or which families are known.
    """
    folder = HFFolder(path)
    name = architecture_of(folder)
    family = family_of(name, where=f"the model in {str(path)!r}")
    if family.scalar is None:
        raise ConfigError(
            f"the model in {str(path)!r} is of the family {family.name!r}, which names no class"
            " with a scalar head: values and rewards take a model of another family"
        )
    labels = folder.config.get("num_labels") or len(folder.config.get("id2label") or {0: "", 1: ""})
    if name == family.scalar and labels != 1:
        raise ConfigError(
            f"the model in {str(path)!r} has {labels} labels, expected 1: a value or a reward is"
            " one number; train it from a model with one label, or from a causal model"
        )
    check_is_whole(folder)
    return folder


def load_scalar_model(
    path: str | Path,
    *,
    head_init: HeadInit,
    pad_token_id: int | None = None,
    dtype: DType = "float32",
    device: str = "cpu",
    gradient_checkpointing: bool = False,
) -> Any:
    """The model, ready for `response_scores`; its head from the folder, where it has one.

    A new head is zero, or of standard deviation 1 / sqrt(D + 1) (Stiennon et al., arXiv 2009.01325)
    and equal wherever it is made. `pad_token_id` is for those who load the folder later and know
    the ends of texts by padding, where the folder names none.

    Raises ConfigError where the folder does not hold what it says.
    """
    folder = check_scalar_folder(path)
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the head, which is looked at below
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            Path(path).expanduser(),
            num_labels=1,
            dtype=getattr(torch, dtype),
            attn_implementation=attention_of(family_of(architecture_of(folder))),
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as cause:
        raise ConfigError(f"the model in {str(path)!r} cannot be loaded: {cause}") from cause
    finally:
        logging.set_verbosity(verbosity)
    missing = set(loading["missing_keys"])
    if missing - {_HEAD}:
        raise ConfigError(
            f"the weights in {str(path)!r} lack {', '.join(sorted(missing - {_HEAD})[:4])}: save"
            " the model there again"
        )
    if missing:
        make_head(model.score.weight, head_init)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_token_id
    return made_ready(model, device=device, gradient_checkpointing=gradient_checkpointing)


def scalar_config(path: str | Path) -> Any:
    """Of the model with a scalar head that a folder is, or becomes."""
    folder = check_scalar_folder(path)
    config = AutoConfig.from_pretrained(folder.path, num_labels=1, local_files_only=True)
    config.architectures = [family_of(architecture_of(folder)).scalar]
    return config


@torch.no_grad()
def make_head(weight: Tensor, init: HeadInit) -> None:  # [1, D]
    """Fills a new head, alike wherever it is made."""
    weight.zero_()
    if init == "small":
        width = weight.shape[1]
        draws = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
        weight.copy_(draws / (width + 1) ** 0.5)


def response_scores(
    model: Any,
    prompts: Sequence[Tensor],  # B of [p]
    responses: Sequence[Tensor],  # B of [r]
    groups: Sequence[int] | None = None,  # B: neighbours of equal group share their prompt
    *,
    layout: Layout = "auto",
) -> Tensor:  # [T] float32
    """The score of the state before each response token: the end of the prompt for the first."""
    if chosen_layout(model, prompts, responses, layout) == "padded":
        padded: Tensor = model.score(padded_hidden(model, prompts, responses))[:, 0].float()
        return padded
    hidden, plan = shared_prefix_hidden(model, prompts, responses, groups)
    scores: Tensor = model.score(hidden)[:, 0].float()  # [U]
    return scores.index_select(0, plan.score_rows.index_select(0, plan.sample_order))


def last_scores(
    model: Any,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    groups: Sequence[int] | None = None,
    *,
    layout: Layout = "auto",
) -> Tensor:  # [B] float32
    """The score of the state at the last token of each response (of the prompt, if it is empty)."""
    longer = one_longer(responses)
    scores = response_scores(model, prompts, longer, groups, layout=layout)
    ends = torch.tensor([len(r) for r in longer]).cumsum(0) - 1
    return scores.index_select(0, ends.to(scores.device))


def one_longer(responses: Sequence[Tensor]) -> list[Tensor]:  # B of [r] -> B of [r + 1]
    """Each response with a token more, so that its real last one is before a token. Which it is
    does not matter: a pass never reads the last.
    """
    return [torch.cat([r, r.new_zeros(1)]) for r in responses]
