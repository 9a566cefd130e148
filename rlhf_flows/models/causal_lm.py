"""Hugging Face folders: a cheap look at one (no weights read), and loading it.

The decision here: only models of a known family are taken, one whose logprobs and gradients were
tested against plain `transformers` in its layouts, or that a program registered; what a model of
another kind would compute is not known, so it is refused by name before anything starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from rlhf_flows.errors import ConfigError
from rlhf_flows.models.families import Family, family_of
from rlhf_flows.modules.hf_folder import HFFolder

__all__ = [
    "DType",
    "architecture_of",
    "attention_of",
    "check_is_whole",
    "check_model_folder",
    "load_causal_lm",
    "load_tokenizer",
    "made_ready",
]

DType = Literal["float32", "bfloat16"]


def check_model_folder(path: str | Path) -> HFFolder:
    """What the folder says of its model, if it is one that can be trained here.

    Raises ConfigError that says what is missing, or which families are known.
    """
    folder = HFFolder(path)
    architecture = architecture_of(folder)
    family = family_of(architecture, where=f"the model in {str(path)!r}")
    if architecture != family.causal:
        raise ConfigError(
            f"the model in {str(path)!r} is a {architecture}, which has no language-model head:"
            f" expected a {family.causal}"
        )
    check_is_whole(folder)
    return folder


def architecture_of(folder: HFFolder) -> str:
    """The class that the folder names for its model."""
    return str((folder.config.get("architectures") or ["(none named)"])[0])


def check_is_whole(folder: HFFolder) -> None:
    """Raises ConfigError where weights or tokenizer are missing."""
    for pattern, what in (("*.safetensors", "weights"), ("tokenizer*", "tokenizer")):
        if not any(folder.path.glob(pattern)):
            raise ConfigError(
                f"the folder {str(folder.path)!r} has no {what} ({pattern}): save model and"
                " tokenizer there with save_pretrained"
            )


def load_causal_lm(
    path: str | Path,
    *,
    dtype: DType = "float32",
    device: str = "cpu",
    gradient_checkpointing: bool = False,
) -> Any:
    """The model, ready for `response_logprobs`: dropout off, as ratios of one policy demand.

    Raises ConfigError where the folder does not hold what it says.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = check_model_folder(path)
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            Path(path).expanduser(),
            dtype=getattr(torch, dtype),
            attn_implementation=attention_of(family_of(architecture_of(folder))),
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as cause:
        raise ConfigError(f"the model in {str(path)!r} cannot be loaded: {cause}") from cause
    return made_ready(model, device=device, gradient_checkpointing=gradient_checkpointing)


def attention_of(family: Family) -> str | None:
    """The attention implementation to load a model of this family with; None is its own."""
    from rlhf_flows.models.shared_prefix import ATTENTION

    return ATTENTION if family.shared_prefix else None


def made_ready(model: Any, *, device: str, gradient_checkpointing: bool) -> Any:
    """A loaded model as the passes of this package want it: without dropout, its layers fused."""
    from rlhf_flows.models.fused_layers import fuse_layers

    for module in model.modules():
        for dropout in ("p", "attention_dropout", "jitter_noise"):
            if isinstance(getattr(module, dropout, None), float):
                setattr(module, dropout, 0.0)
    fuse_layers(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device)


def load_tokenizer(path: str | Path) -> Any:
    """The folder's tokenizer. Raises ConfigError where there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(Path(path).expanduser(), local_files_only=True)
    except (OSError, ValueError) as cause:
        raise ConfigError(f"the tokenizer in {str(path)!r} cannot be loaded: {cause}") from cause
