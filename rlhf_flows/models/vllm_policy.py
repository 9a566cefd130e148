"""`VLLMPolicy`: a Hugging Face causal language model that samples with vLLM.

Everything about sampling is in `rlhf_flows.modules.vllm_module`, everything about columns in
`rlhf_flows.models.policy_role`; here they are one module.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_flows.errors import ConfigError
from rlhf_flows.generation import GenerationSettings
from rlhf_flows.models.dataset_role import DatasetType
from rlhf_flows.models.policy_role import GeneratingPolicy
from rlhf_flows.modules.vllm_module import VLLMModule

__all__ = ["VLLMPolicy"]


class VLLMPolicy(VLLMModule, GeneratingPolicy):
    """Completes prompts with vLLM; adds the behaviour log-probability of every token."""

    tokenizer = GeneratingPolicy.tokenizer

    def __init__(
        self,
        name: str = "policy",
        *,
        path: str | Path,
        generation: GenerationSettings | None = None,
        eval_generation: GenerationSettings | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        chat_template: bool | None = None,
        max_num_seqs: int = 256,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        dataset: DatasetType = None,
        dataset_args: Mapping[str, Any] | None = None,
        eval_dataset: DatasetType = None,
        eval_dataset_args: Mapping[str, Any] | None = None,
        **engine_args: Any,
    ) -> None:
        """As `GeneratingPolicy`; after `chat_template`, as `VLLMModule.setup_engine`."""
        GeneratingPolicy.__init__(
            self,
            name,
            path=path,
            generation=generation,
            eval_generation=eval_generation,
            dtype=dtype,
            max_model_len=max_model_len,
            chat_template=chat_template,
            dataset=dataset,
            dataset_args=dataset_args,
            eval_dataset=eval_dataset,
            eval_dataset_args=eval_dataset_args,
        )
        self.engine_args = {
            "max_num_seqs": max_num_seqs,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "gpu_memory_utilization": gpu_memory_utilization,
            **engine_args,
        }

    def validate(self) -> None:
        if not self.available():
            raise ConfigError(
                f"module {self.name!r} samples with vLLM, which is not installed: install"
                " `rlhf-flows[cpu]` or `rlhf-flows[gpu]`, or use TorchPolicy"
            )
        super().validate()

    def setup(self) -> None:
        self.setup_engine(
            self.path,
            dtype=self.dtype,
            max_model_len=self.max_model_len_asked,
            end_token_ids=self.end_token_ids,
            **self.engine_args,
        )
