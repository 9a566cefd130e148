"""`ClassifierReward`: a Hugging Face classifier of texts scores completions.

Such as a BERT-like model of sentiment, with a tokenizer of its own. The decision here: it reads
texts, not the policy's tokens, which mean nothing to it: `prompt` and `completion` are tokenized
again, cut at what it takes, and sorted by length so that little is padded. The reward is the logit
of one label, as it is: a probability would be flat wherever the classifier is sure.

Letters: B samples, T tokens of the longest text of a pass, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from rlhf_flows.data.batch import Batch
from rlhf_flows.errors import ConfigError, DataError
from rlhf_flows.models.causal_lm import DType, architecture_of, check_is_whole, load_tokenizer
from rlhf_flows.models.reward_results import Scoring
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.modules.hf_folder import HFFolder
from rlhf_flows.registry import nearest
from rlhf_flows.reward_settings import OnFailure, ScoredText

__all__ = ["ClassifierReward"]

_KIND = "ForSequenceClassification"
_MOST_TOKENS = 1 << 20
"""A tokenizer that knows no limit says 1e30."""


class ClassifierReward(BaseModule):
    """Adds `reward` [B] float32: the logit of a label."""

    def __init__(
        self,
        name: str = "reward",
        *,
        path: str | Path,
        label: str | int | None = None,
        scored_text: ScoredText = "whole",
        dtype: DType = "float32",
        micro_batch_tokens: int = 16384,
        on_failure: OnFailure = "stop",
        failure_reward: float = 0.0,
    ) -> None:
        """
        Args:
            path: a local Hugging Face folder: a model for sequence classification and its own
                tokenizer.
            label: the label whose logit is the reward, by its name in the folder or its number,
                from 0; the last one by default ("positive" of most models of sentiment).
            scored_text: "whole" is prompt and completion as one text, "completion" that alone,
                "pair" both as two segments. Longer texts are cut on the side that the tokenizer
                says (its `truncation_side`); of a pair, the longer one is.
            dtype: of weights and activations; the reward is float32.
            micro_batch_tokens: most tokens of one pass, padding included.
            on_failure: "stop": a text without tokens, or a logit that is not finite, ends the run.
                "score": its sample gets `failure_reward`, and the cause stands in `reward_failure`.
        """
        super().__init__(name)
        self.path = Path(path).expanduser().absolute()
        self.label = label
        self.scored_text: ScoredText = scored_text
        self.dtype: DType = dtype
        self.micro_batch_tokens = micro_batch_tokens
        self.on_failure: OnFailure = on_failure
        self.failure_reward = failure_reward
        self._loaded: tuple[Any, Any] | None = None

    def validate(self) -> None:
        """Reads the folder's configuration; loads nothing. Raises ConfigError."""
        if self.scored_text not in get_args(ScoredText):
            raise ConfigError(
                f"scored_text of module {self.name!r} is {self.scored_text!r}, expected one of"
                f" {', '.join(get_args(ScoredText))}"
            )
        if self.dtype not in get_args(DType) or self.micro_batch_tokens < 1:
            raise ConfigError(
                f"module {self.name!r} has dtype {self.dtype!r} and micro_batch_tokens"
                f" {self.micro_batch_tokens}, expected one of {', '.join(get_args(DType))}, and at"
                " least 1"
            )
        Scoring.check(self.name, on_failure=self.on_failure, failure_reward=self.failure_reward)
        folder = HFFolder(self.path)
        if not architecture_of(folder).endswith(_KIND):
            raise ConfigError(
                f"the model in {str(self.path)!r} is a {architecture_of(folder)}, expected a"
                f" classifier of texts (...{_KIND}), such as BertForSequenceClassification"
            )
        check_is_whole(folder)
        self._label_number(folder)

    def fingerprint(self) -> bytes:
        """With names, sizes and times of the folder's files: one that is trained on is another."""
        files = sorted(p for p in self.path.glob("*") if p.is_file())
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return super().fingerprint() + repr(stats).encode()

    def _label_number(self, folder: HFFolder) -> int:
        named: Mapping[str, str] = folder.config.get("id2label") or {}
        # A folder that names no labels has as many as it says, or two, as transformers has it.
        count = len(named) or int(folder.config.get("num_labels") or 2)
        names = {str(name): int(number) for number, name in named.items()}
        if self.label is None:
            return count - 1
        if isinstance(self.label, str) and self.label in names:
            return names[self.label]
        if isinstance(self.label, int) and 0 <= self.label < count:
            return self.label
        known = ", ".join(f"{number}: {name!r}" for name, number in names.items())
        raise ConfigError(
            f"the classifier in {str(self.path)!r} has no label {self.label!r}"
            f"{nearest(str(self.label), list(names))}: it has {known or f'0 to {count - 1}'}"
        )

    # ---- work -------------------------------------------------------------------------------

    def setup(self) -> None:
        """Loads model and tokenizer. Raises ConfigError where the folder holds something else."""
        logging.disable_progress_bar()
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it would warn of weights, which are looked at below
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                self.path,
                dtype=getattr(torch, self.dtype),
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as cause:
            raise ConfigError(
                f"the classifier in {str(self.path)!r} cannot be loaded: {cause}"
            ) from cause
        finally:
            logging.set_verbosity(verbosity)
        if missing := sorted(loading["missing_keys"]):
            raise ConfigError(
                f"the weights in {str(self.path)!r} lack {', '.join(missing[:4])}, which would be"
                " drawn at random: save the trained classifier there again"
            )
        model.requires_grad_(False).eval().to(self.context.device)
        self._loaded = model, load_tokenizer(self.path)

    @torch.no_grad()
    def forward_step(self, data: Batch, iteration: int = 0) -> Batch:
        """Only the new columns, row by row. Reads `completion`, and `prompt` where it scores that.

        Raises:
            DataError: the batch has no such column.
            RewardError: a text has no token, or a logit is not finite.
        """
        assert self._loaded is not None, "setup() comes first"
        model, tokenizer = self._loaded
        scoring = Scoring(
            data,
            label=f"classifier {str(self.path)!r} of module {self.name!r}",
            on_failure=self.on_failure,
            failure_reward=self.failure_reward,
        )
        texts = self._texts(data)
        if not scoring.num_samples:
            return scoring.columns_of([])
        encoded = tokenizer(*texts, truncation=True, max_length=_limit(model, tokenizer))
        lengths = [len(ids) for ids in encoded["input_ids"]]
        label = self._label_number(HFFolder(self.path))
        rows: list[Any] = [None] * scoring.num_samples
        # Texts of a tokenizer that knows no padding go one by one.
        budget = 0 if tokenizer.pad_token_id is None else self.micro_batch_tokens
        for part in _cut(lengths, budget):
            inputs = {name: [encoded[name][i] for i in part] for name in encoded}
            padded = {n: t.to(self.context.device) for n, t in _padded(inputs, tokenizer).items()}
            logits = model(**padded).logits[:, label].float()  # [b] of [b, C]
            for i, logit in zip(part, logits.tolist(), strict=True):
                rows[i] = logit
        for i, length in enumerate(lengths):
            if not length:
                rows[i] = scoring.fail(
                    i,
                    "was given a text without tokens",
                    hint="Score the prompt, too (scored_text=whole), or let it fail as a score",
                )
        return scoring.columns_of(rows)

    def _texts(self, data: Batch) -> tuple[list[str], ...]:
        """One list of B texts, or the two of pairs."""
        wanted = ("completion",) if self.scored_text == "completion" else ("prompt", "completion")
        for name in wanted:
            if name not in data:
                raise DataError(
                    f"module {self.name!r} needs the column {name!r} to score, and the batch has"
                    f" {sorted(data)}: a policy adds the completion, its dataset the prompt"
                )
        columns = [[str(text) for text in data[name]] for name in wanted]
        if self.scored_text == "whole":
            return ([prompt + completion for prompt, completion in zip(*columns, strict=True)],)
        return tuple(columns)


def _limit(model: Any, tokenizer: Any) -> int:
    """Most tokens of a text: what the tokenizer says, and what the model has positions for."""
    limits = [int(min(tokenizer.model_max_length, _MOST_TOKENS))]
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count from after the position of padding.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - first)
    return min(limits)


def _cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows by length, the longest first, in passes of at most `budget` tokens with padding."""
    passes: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not lengths[i]:
            continue
        if not room:
            passes.append([])
            room = max(1, budget // lengths[i])
        passes[-1].append(i)
        room -= 1
    return passes


def _padded(inputs: Mapping[str, list[list[int]]], tokenizer: Any) -> dict[str, Tensor]:
    """[b, T] tensors, padded behind."""
    fill = {
        "input_ids": tokenizer.pad_token_id or 0,
        "token_type_ids": tokenizer.pad_token_type_id,
        "attention_mask": 0,
    }
    return {
        name: pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=fill[name]
        )
        for name, rows in inputs.items()
        if name in fill
    }
