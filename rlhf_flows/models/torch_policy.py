"""`TorchPolicy`: a Hugging Face causal language model that samples with plain transformers.

For machines without vLLM; same arguments, same columns, same rules. The decision here: siblings
share their prompt. Each different prompt of a call goes through the model once, its keys and values
are handed to all of its rows, and rows that are done leave the batch. The same call gives the same
bits.

Letters: B rows, U different prompts, P padded prompt length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_flows.generation import Completion, GenerationSettings, check_request
from rlhf_flows.models.causal_lm import load_causal_lm
from rlhf_flows.models.families import conversion_of, family_of
from rlhf_flows.models.policy_role import GeneratingPolicy
from rlhf_flows.models.sampling import draw, processed_logprobs, row_uniforms
from rlhf_flows.modules.hf_folder import HFFolder
from rlhf_flows.modules.torch_module import TorchModule

__all__ = ["TorchPolicy"]

MAX_ROWS = 256
"""Most rows computed at the same time."""


class TorchPolicy(GeneratingPolicy, TorchModule):
    """Completes prompts with transformers; adds the behaviour log-probability of every token."""

    takes_any_dtype = True

    def setup(self) -> None:
        dtype: Any = HFFolder(self.path).dtype if self.dtype == "auto" else self.dtype
        self.model = load_causal_lm(self.path, dtype=dtype, device=self.context.device)
        self.conversion = conversion_of(self.model)
        if family_of(type(self.model).__name__).shared_prefix:
            # Padded prompts and a growing cache are nothing for the trainer's own attention.
            self.model.set_attn_implementation("sdpa")
        self.model.eval()
        self._ends = self.end_token_ids

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        settings: GenerationSettings,
    ) -> list[Completion]:
        """One completion for each prompt, in order; the same call gives the same bits.

        Raises:
            DataError: a prompt is empty, or leaves no room for `settings.max_new_tokens`.
        """
        check_request(
            prompt_ids,
            seeds=seeds,
            settings=settings,
            max_model_len=self.length_limit,
            module=self.name,
        )
        completions: list[Completion] = []
        for start in range(0, len(prompt_ids), MAX_ROWS):
            rows = slice(start, start + MAX_ROWS)
            completions += self._generate_rows(prompt_ids[rows], seeds[rows], settings)
        return completions

    def _generate_rows(
        self,
        prompt_ids: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: GenerationSettings,
    ) -> list[Completion]:
        device = self.context.device
        logits, mask, cache = self._read_prompts(prompt_ids)  # [B, V], [B, P]
        uniforms = row_uniforms(seeds, settings.max_new_tokens)
        stop_ids = {*settings.stop_token_ids, *(() if settings.ignore_eos else self._ends)}
        ids: list[list[int]] = [[] for _ in prompt_ids]
        logprobs: list[list[float]] = [[] for _ in prompt_ids]
        stopped: set[int] = set()
        rows = list(range(len(prompt_ids)))
        """The rows still in the batch."""
        for step in range(settings.max_new_tokens):
            distribution = processed_logprobs(logits, settings)
            if settings.greedy:
                tokens = distribution.argmax(-1)
            else:
                tokens = draw(distribution, uniforms[rows, step])
            chosen = distribution.gather(-1, tokens[:, None])[:, 0]
            for row, token, logprob in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
                ids[row].append(token)
                logprobs[row].append(logprob)
                if token in stop_ids or self._ends_with_a_stop(ids[row], settings.stop):
                    stopped.add(row)
            left = [i for i, row in enumerate(rows) if row not in stopped]
            if not left or step + 1 == settings.max_new_tokens:
                break
            if len(left) < len(rows):
                keep = torch.tensor(left, device=device)
                rows, tokens, mask = [rows[i] for i in left], tokens[keep], mask[keep]
                cache.reorder_cache(keep)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = self._next_logits(tokens[:, None], mask, cache)
        return [
            Completion(ids=i, logprobs=p, finish_reason="stop" if row in stopped else "length")
            for row, (i, p) in enumerate(zip(ids, logprobs, strict=True))
        ]

    def _read_prompts(self, prompt_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Any]:
        """Logits [B, V] after each prompt, the mask [B, P] and the cache, each prompt read once."""
        from transformers import DynamicCache

        prompts = {tuple(ids): None for ids in prompt_ids}
        place = {ids: i for i, ids in enumerate(prompts)}
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(ids)) + list(ids) for ids in prompts]
        real = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        device = self.context.device
        mask = torch.tensor(real, device=device)  # [U, P]
        cache: Any = DynamicCache(config=self.model.config)
        logits = self._next_logits(torch.tensor(padded, device=device), mask, cache)  # [U, V]
        siblings = torch.tensor([place[tuple(ids)] for ids in prompt_ids], device=device)  # [B]
        cache.reorder_cache(siblings)
        return logits[siblings], mask[siblings], cache

    def _next_logits(self, tokens: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """[B, V] after `tokens` [B, n], which end a text of `mask` [B, length]."""
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)[:, -tokens.shape[1] :]
        output = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _ends_with_a_stop(self, ids: list[int], stop: Sequence[str]) -> bool:
        if not stop:
            return False
        # A stop string that this token completed lies within as many tokens as it has characters.
        tail = self.tokenizer.decode(ids[-max(map(len, stop)) - 1 :])
        return any(s in tail for s in stop)
