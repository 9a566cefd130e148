"""What a Hugging Face model folder says about itself, read without loading the model.

The decision here: `config.json` and the headers of the safetensors files answer every question that
must be settled before an engine is touched (how long may a text be, what ends one, which names and
shapes have the weights). Milliseconds, and no transformers. Which architectures are taken is the
affair of `rlhf_flows.models.causal_lm`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from rlhf_flows.errors import ConfigError, SyncError

__all__ = ["HFFolder"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_OTHER_NAMES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""What GPT-2 and its kin call the fields of their configuration."""


class HFFolder:
    """A local folder with `config.json` and safetensors weights.

    Raises:
        ConfigError: there is no such folder, or no configuration in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise ConfigError(
                f"no model folder at {str(path)!r}: give a local Hugging Face folder (with"
                " config.json, weights and tokenizer); nothing is downloaded"
            )
        self.config: Mapping[str, Any] = self._json("config.json")

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as e:
            raise ConfigError(
                f"the folder {str(self.path)!r} has no {name}, so it is no Hugging Face model:"
                f" it holds {sorted(p.name for p in self.path.iterdir())[:8]}"
            ) from e
        except ValueError as e:
            raise ConfigError(f"{file} is not JSON ({e}): save the model again") from e
        if not isinstance(content, dict):
            raise ConfigError(f"{file} holds a {type(content).__name__}, expected an object")
        return content

    @cached_property
    def _text_config(self) -> Mapping[str, Any]:
        # Models with more than text keep the language model's fields one level down.
        return self.config.get("text_config") or self.config

    def _field(self, name: str, default: int | None = None) -> int:
        c = self._text_config
        value = c.get(name, c.get(_OTHER_NAMES.get(name, name), default))
        if value is None:
            raise ConfigError(
                f"config.json in {str(self.path)!r} says nothing of {name!r}: save the model again"
            )
        return int(value)

    @property
    def dtype(self) -> str:
        """The precision the weights are kept in: `float32`, `bfloat16` or `float16`."""
        dtype = self._text_config.get("dtype") or self._text_config.get("torch_dtype") or "float32"
        return str(dtype).removeprefix("torch.")

    @property
    def max_positions(self) -> int:
        """Most tokens, prompt and completion together, that the model takes."""
        return self._field("max_position_embeddings", 2048)

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding: one more than the largest token id."""
        return self._field("vocab_size")

    @cached_property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end a text, by the generation configuration and the model's."""
        named = [self._text_config.get("eos_token_id"), self.config.get("eos_token_id")]
        if (self.path / "generation_config.json").is_file():
            named.append(self._json("generation_config.json").get("eos_token_id"))
        lists = [ids if isinstance(ids, list) else [ids] for ids in named if ids is not None]
        return frozenset(int(i) for ids in lists for i in ids)

    @property
    def head_width(self) -> int:
        own = self._text_config.get("head_dim")
        return int(own or self._field("hidden_size") // self._field("num_attention_heads"))

    def cache_bytes_per_token(self, dtype: str) -> int:
        """Bytes of keys and values that one token keeps in all layers."""
        heads = self._text_config.get("num_key_value_heads") or self._field("num_attention_heads")
        layers = self._field("num_hidden_layers")
        return 2 * layers * int(heads) * self.head_width * DTYPE_BYTES.get(dtype, 4)

    @cached_property
    def _weight_files(self) -> tuple[Path, ...]:
        return tuple(sorted(self.path.glob("*.safetensors")))

    @cached_property
    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every weight, as the model's class writes them; without what is derived
        or tied.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for file in self._weight_files:
            with safe_open(file, framework="pt") as weights:
                names = [n for n in weights.keys() if not self._is_derived(n)]  # noqa: SIM118
                shapes |= {self._name(n): tuple(weights.get_slice(n).get_shape()) for n in names}
        return shapes

    @cached_property
    def weight_files(self) -> Mapping[str, Path]:
        """The file of every weight in `weight_shapes`, under whose name it stands there."""
        files: dict[str, Path] = {}
        for file in self._weight_files:
            with safe_open(file, framework="pt") as weights:
                names = [n for n in weights.keys() if not self._is_derived(n)]  # noqa: SIM118
                files |= dict.fromkeys(names, file)
        return files

    def _is_derived(self, name: str) -> bool:
        tied = bool(self.config.get("tie_word_embeddings"))
        if self._is_gpt2 and name.endswith((".attn.bias", ".attn.masked_bias")):
            return True  # masks, in files of long ago
        return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")

    def _name(self, name: str) -> str:
        """The published files of GPT-2 are of the model without its head, whose names are bare."""
        bare = self._is_gpt2 and not name.startswith(("transformer.", "lm_head.", "score."))
        return f"transformer.{name}" if bare else name

    @property
    def _is_gpt2(self) -> bool:
        return self.config.get("model_type") == "gpt2"

    def check_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Raises SyncError unless these are all of this model's weights, with their shapes."""
        self.check_shapes({name: tuple(tensor.shape) for name, tensor in weights})

    def check_shapes(self, found: Mapping[str, tuple[int, ...]]) -> None:
        """As `check_weights`, of names and shapes."""
        expected = self.weight_shapes
        missing = [n for n in expected if n not in found]
        unknown = [n for n in found if n not in expected and not self._is_derived(n)]
        wrong = [n for n in expected if n in found and expected[n] != found[n]]
        if not (missing or unknown or wrong):
            return
        parts = [
            f"{len(names)} {what} (first {names[0]!r})"
            for names, what in ((missing, "missing"), (unknown, "unknown"))
            if names
        ]
        if wrong:
            n = wrong[0]
            parts.append(f"{len(wrong)} of another shape (first {n!r}: {found[n]}, {expected[n]})")
        raise SyncError(
            f"these are not the {len(expected)} weights ({_count(expected)} numbers) of"
            f" {str(self.path)!r}: {', '.join(parts)}. Sender and receiver must start from the"
            " same model; nothing was changed"
        )


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
