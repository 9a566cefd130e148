"""`PreferenceReference`: the frozen model that DPO compares with, on pairs of completions.

Letters: B pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlhf_flows.data.batch import Batch
from rlhf_flows.models.causal_lm import DType
from rlhf_flows.models.dataset_role import DatasetType
from rlhf_flows.models.pairs import MakesPairs, as_samples, check_pair_batch
from rlhf_flows.models.response_logprobs import Layout
from rlhf_flows.settings import DPOSettings

__all__ = ["PreferenceReference"]


class PreferenceReference(MakesPairs):
    """Comes first in a flow of pairs: makes their dataset, and adds the logprob of each
    completion under the frozen model. Chosen and rejected share their prompt in one pass.
    """

    def __init__(
        self,
        name: str = "reference",
        *,
        path: str | Path,
        dpo: DPOSettings | None = None,
        dtype: DType = "float32",
        micro_batch_tokens: int = 8192,
        chat_template: bool | None = None,
        layout: Layout = "auto",
        dataset: DatasetType = None,
        dataset_args: Mapping[str, Any] | None = None,
    ) -> None:
        """`dpo` is that of the trainer; the rest is as in `CausalLMModule`.

        `dataset` makes items of the rows, `rw_pair` if not given: a name (`register_dataset`),
        `package.module:Class`, or a class; `dataset_args` are its arguments, such as
        `max_pairs_per_prompt`.
        """
        super().__init__(
            name, path=path, dtype=dtype, micro_batch_tokens=micro_batch_tokens, layout=layout
        )
        self.dpo = dpo or DPOSettings()
        self.chat_template = chat_template
        self.choose_dataset(dataset, dataset_args)

    def setup(self) -> None:
        super().setup()
        self.model.requires_grad_(False)

    def pair_settings(self) -> DPOSettings:
        return self.dpo

    def forward_step(self, data: Batch, iteration: int = 0) -> Batch:
        """Adds `reference_chosen_logprob` and `reference_rejected_logprob`, [B] float32."""
        check_pair_batch(data, self.name)
        logprobs = self.all_logprobs(as_samples(data), temperature=self.dpo.temperature)
        chosen, rejected = torch.stack([row.sum() for row in logprobs]).view(-1, 2).unbind(1)
        return {
            **data,
            "reference_chosen_logprob": chosen.clone(),
            "reference_rejected_logprob": rejected.clone(),
        }
