"""Hugging Face folders: a cheap look at one (no weights read), and loading it.

The decision here: only architectures whose logprobs and gradients were tested against plain
`transformers` in the shared-prefix layout are taken; what a model of another kind would compute
there is not known, so it is refused by name before anything starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from rlhf_flows.errors import ConfigError
from rlhf_flows.modules.hf_folder import HFFolder

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "DType",
    "architecture_of",
    "check_is_whole",
    "check_model_folder",
    "load_causal_lm",
    "load_tokenizer",
    "made_ready",
]

DType = Literal["float32", "bfloat16"]

SUPPORTED_ARCHITECTURES = (
    "GemmaForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)


def check_model_folder(path: str | Path) -> HFFolder:
    """What the folder says of its model, if it is one that can be trained here.

    Raises ConfigError that says what is missing, or which architectures are supported.
    """
    folder = HFFolder(path)
    architecture = architecture_of(folder)
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ConfigError(
            f"the model in {str(path)!r} is a {architecture}, expected one of"
            f" {', '.join(SUPPORTED_ARCHITECTURES)}"
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

    from rlhf_flows.models.shared_prefix import ATTENTION

    check_model_folder(path)
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            Path(path).expanduser(),
            dtype=getattr(torch, dtype),
            attn_implementation=ATTENTION,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as cause:
        raise ConfigError(f"the model in {str(path)!r} cannot be loaded: {cause}") from cause
    return made_ready(model, device=device, gradient_checkpointing=gradient_checkpointing)


def made_ready(model: Any, *, device: str, gradient_checkpointing: bool) -> Any:
    """A loaded model as the passes of this package want it: without dropout, its layers fused."""
    from rlhf_flows.models.fused_layers import fuse_layers

    for module in model.modules():
        for dropout in ("p", "attention_dropout"):
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
