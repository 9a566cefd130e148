"""`MegatronRole`: what makes a ready-made trainer train on Megatron.

The decision here: a trainer is a loss, and asks for logprobs or scores of its micro-batches, for
their gradients and for a step (`CausalLMTrainer`). These few methods are answered by Megatron here;
all else of a trainer, its batches, targets, losses and metrics, is the same code on both.

`MegatronRole` stands last among the bases, so that what a trainer adds to setup, weights or state
comes before it; `OnMegatron` stands first, for the one argument more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_flows.data.batch import Batch
from rlhf_flows.errors import ConfigError
from rlhf_flows.models.causal_lm import load_tokenizer
from rlhf_flows.models.causal_lm_module import ragged
from rlhf_flows.models.causal_lm_trainer import CausalLMTrainer, Result
from rlhf_flows.models.logprob_head import ScoredTokens
from rlhf_flows.models.megatron.causal_lm import check_megatron_folder, load_megatron_causal_lm
from rlhf_flows.models.megatron.scalar import check_megatron_scalar_folder, load_megatron_scalar
from rlhf_flows.models.scalar_model import scalar_config
from rlhf_flows.models.scalar_module import ScalarModule
from rlhf_flows.modules.hf_folder import HFFolder
from rlhf_flows.modules.megatron.module import MegatronModule, check_megatron
from rlhf_flows.modules.megatron.topology import Topology
from rlhf_flows.settings import BackendSettings

__all__ = ["MegatronRole", "MegatronScalarRole", "OnMegatron"]


class OnMegatron(MegatronModule):
    """Takes how the ranks share the model, beside a trainer's own arguments."""

    def __init__(self, *args: Any, megatron: BackendSettings | None = None, **kwargs: Any) -> None:
        """
        Args:
            megatron: the topology; a single rank by default.
        """
        super().__init__(*args, **kwargs)
        self.megatron = megatron or BackendSettings(backend="megatron")


class MegatronRole(MegatronModule, CausalLMTrainer):
    """A `CausalLMTrainer` whose model, passes and steps are Megatron's."""

    shares_prompts: ClassVar[bool] = False

    megatron: BackendSettings
    training: Any
    """`MegatronTraining`, once it is set up."""

    # ---- before a rank starts -----------------------------------------------------------------

    def validate(self) -> None:
        super().validate()
        check_megatron()
        if self.megatron.backend != "megatron":
            raise ConfigError(
                f"module {self.name!r} trains on Megatron, and was given"
                f" backend={self.megatron.backend!r}: leave it out"
            )
        if self.layout != "auto":
            raise ConfigError(
                f"layout of module {self.name!r} is {self.layout!r}: on Megatron texts are always"
                " packed, so leave it out"
            )

    def check_folder(self) -> HFFolder:
        folder = super().check_folder()
        check_megatron_folder(self.path, self._topology(self.megatron.data_parallel or 1))
        return folder

    def parallel_sizes(self) -> Mapping[str, int]:
        sizes = {
            "tensor_model_parallel_size": self.megatron.tensor_parallel,
            "pipeline_model_parallel_size": self.megatron.pipeline_parallel,
        }
        if self.megatron.data_parallel is not None:
            sizes["data_parallel_size"] = self.megatron.data_parallel
        return sizes

    def topology(self) -> Topology:
        model_ranks = self.megatron.tensor_parallel * self.megatron.pipeline_parallel
        return self._topology(max(1, self.world_size // model_ranks))

    def _topology(self, copies: int) -> Topology:
        asked = self.megatron
        return Topology(
            world_size=asked.tensor_parallel * asked.pipeline_parallel * copies,
            tensor_parallel=asked.tensor_parallel,
            pipeline_parallel=asked.pipeline_parallel,
            virtual_pipeline=asked.virtual_pipeline,
            sequence_parallel=asked.sequence_parallel,
        )

    # ---- life ---------------------------------------------------------------------------------

    def setup(self) -> None:
        """Collective: every rank."""
        from rlhf_flows.models.megatron.training import MegatronTraining

        self.tokenizer = load_tokenizer(self.path)
        topology = self.topology()
        self.make_groups(topology)
        part = self.load_part(topology)
        self.use_part(part, folder=self.path)
        self.training = MegatronTraining(
            part,
            self.optimizer_settings,
            distributed_optimizer=self.megatron.distributed_optimizer,
        )
        self.optimizer, self.lr_scheduler = self.training.optimizer, self.training.lr_scheduler

    def load_part(self, topology: Topology) -> Any:
        """What this rank has of the folder's model."""
        return load_megatron_causal_lm(
            self.path,
            topology,
            dtype=self.dtype,
            device=self.context.device,
            recompute=self.gradient_checkpointing,
        )

    # ---- what a trainer asks for --------------------------------------------------------------

    def logprobs_of(
        self, data: Batch, *, temperature: float, entropy: bool = False
    ) -> ScoredTokens:  # [T]
        found: ScoredTokens = self.training.logprobs_of(
            data, temperature=temperature, entropy=entropy
        )
        return found

    def all_logprobs(self, data: Batch, *, temperature: float) -> list[Tensor]:  # B of [r]
        """Collective: every rank, the same batch."""
        from rlhf_flows.models.megatron import rows

        return rows.all_logprobs(
            self.training.passes,
            data,
            temperature=temperature,
            micro_batch_tokens=self.micro_batch_tokens,
        )

    def backward_all(
        self, data: Sequence[Batch], loss_of: Callable[[Batch], tuple[Tensor, Result]]
    ) -> list[Result]:
        """Collective: every rank, same order."""
        found: list[Result] = self.training.backward_all(data, loss_of, samples_of=self.samples_of)
        return found

    def optimizer_step(self, sums: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Collective: every rank, same order."""
        stepped: tuple[Tensor, dict[str, float]] = self.training.optimizer_step(
            sums, refuses=self.refuses
        )
        return stepped

    def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Collective: every rank."""
        samples: Batch = {
            "prompt_ids": [torch.tensor(list(s[:1])) for s in sequences],
            "response_ids": [torch.tensor(list(s[1:])) for s in sequences],
        }
        (found,) = self.training.passes.response_logprobs([samples], temperature=1.0)
        lengths = [len(s) - 1 for s in sequences]
        return [row.tolist() for row in ragged(found.logprobs.cpu(), lengths)]


class MegatronScalarRole(MegatronRole, ScalarModule):
    """A `MegatronRole` whose model has a scalar head."""

    def check_folder(self) -> HFFolder:
        folder = ScalarModule.check_folder(self)
        check_megatron_scalar_folder(self.path, self._topology(self.megatron.data_parallel or 1))
        return folder

    def load_part(self, topology: Topology) -> Any:
        return load_megatron_scalar(
            self.path,
            topology,
            head_init=self.head_init,
            dtype=self.dtype,
            device=self.context.device,
            recompute=self.gradient_checkpointing,
        )

    def export_weights(self, weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
        super().export_weights(weights, folder)
        config = scalar_config(self.path)
        if config.pad_token_id is None:  # later readers know the ends of texts by padding
            pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
            config.pad_token_id = end if pad is None else pad
        config.dtype = self.dtype
        config.save_pretrained(folder)

    def vocabulary_size(self) -> int:
        """0: a probe compares logprobs, and this model has none; its weights have a digest."""
        return 0

    def scores_of(self, data: Batch) -> Tensor:  # [T]
        scores: Tensor = self.training.scores_of(data)
        return scores

    def last_scores_of(self, data: Batch) -> Tensor:  # [B]
        scores: Tensor = self.training.last_scores_of(data)
        return scores

    def all_scores(self, data: Batch, *, ends: bool = False) -> list[Tensor]:  # B of [r]
        """Collective: every rank, the same batch."""
        from rlhf_flows.models.megatron import rows

        return rows.all_scores(
            self.training.passes, data, ends=ends, micro_batch_tokens=self.micro_batch_tokens
        )

    def all_last_scores(self, data: Batch) -> list[Tensor]:  # B of []
        """Collective: every rank, the same batch."""
        from rlhf_flows.models.megatron import rows

        return rows.all_last_scores(
            self.training.passes, data, micro_batch_tokens=self.micro_batch_tokens
        )
