"""Hugging Face folders: a cheap look at one (no torch, no weights read), and loading it.

The decision here: only architectures whose logprobs and gradients were tested against plain
`transformers` in the shared-prefix layout are taken; what a model of another kind would compute
there is not known, so it is refused by name before anything starts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_flows.errors import ConfigError

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "DType",
    "ModelFolder",
    "check_model_folder",
    "load_causal_lm",
    "load_tokenizer",
]

DType = Literal["float32", "bfloat16"]

SUPPORTED_ARCHITECTURES = (
    "GemmaForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """What config.json says."""

    path: Path
    architecture: str
    max_tokens: int | None
    """Longest sequence the model takes; None where the folder does not say."""
    vocabulary: int


def check_model_folder(path: str | Path) -> ModelFolder:
    """Looks whether `path` is a folder of a supported causal model, weights and tokenizer there.

    Raises ConfigError that says what is missing.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise ConfigError(
            f"no model folder at {str(path)!r}: give the path of a local Hugging Face folder (one"
            " with config.json, model.safetensors and a tokenizer)"
        )
    if not folder.is_dir():
        raise ConfigError(f"{str(path)!r} is a file: give the folder that holds config.json")
    config = _read_config(folder)
    architectures = config.get("architectures") or []
    architecture = architectures[0] if architectures else None
    if architecture not in SUPPORTED_ARCHITECTURES:
        found = f"of architecture {architecture!r}" if architecture else "without an architecture"
        raise ConfigError(
            f"the model in {str(path)!r} is {found}; supported are"
            f" {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{str(path)!r} holds no *.safetensors: the weights are missing, or in a format that"
            " is not read here; save the model with save_pretrained"
        )
    if not (folder / "tokenizer.json").exists() and not any(folder.glob("tokenizer*")):
        raise ConfigError(
            f"{str(path)!r} holds no tokenizer: save it beside the model with"
            " tokenizer.save_pretrained"
        )
    return ModelFolder(
        path=folder,
        architecture=architecture,
        max_tokens=config.get("max_position_embeddings"),
        vocabulary=int(config.get("vocab_size", 0)),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        raise ConfigError(
            f"{str(folder)!r} holds no config.json, so it is no Hugging Face model folder"
        )
    try:
        config = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as cause:
        raise ConfigError(f"{str(file)!r} is not valid JSON: {cause}") from cause
    if not isinstance(config, dict):
        raise ConfigError(f"{str(file)!r} holds a {type(config).__name__}, expected an object")
    return config


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
    except (OSError, ValueError, RuntimeError) as cause:
        raise ConfigError(f"the model in {str(path)!r} cannot be loaded: {cause}") from cause
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    return model.to(device)


def load_tokenizer(path: str | Path) -> Any:
    """The folder's tokenizer. Raises ConfigError where there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(Path(path).expanduser(), local_files_only=True)
    except (OSError, ValueError) as cause:
        raise ConfigError(f"the tokenizer in {str(path)!r} cannot be loaded: {cause}") from cause
