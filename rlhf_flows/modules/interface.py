"""`ModelInterface`: model code by what it does, in ReaL's words: generate, inference, train_step.

A module like all others; the two first are names of what `forward_step` is to the rest of the
system.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from rlhf_flows.errors import ConfigError
from rlhf_flows.modules.torch_module import TorchModule

if TYPE_CHECKING:
    from rlhf_flows.data.batch import Batch

__all__ = ["Doing", "ModelInterface"]

Doing = Literal["generate", "inference", "train_step"]


class ModelInterface(TorchModule):
    """Subclass it with `setup`, and one or more of `generate`, `inference` and `train_step`.

    A batch is a dict of columns, one row a sample; `generate` and `inference` return their new
    columns. One that defines `generate` samples: its calls are the rollout phase.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.generates = cls.generate is not ModelInterface.generate

    def generate(self, data: Batch) -> Batch:
        """Completions of prompts."""
        raise ConfigError(
            f"module {self.name!r} is asked to generate, but {type(self).__name__} defines no"
            " generate(data)"
        )

    def inference(self, data: Batch) -> Batch:
        """What a model says of samples: a score, logprobs, a label."""
        raise ConfigError(
            f"module {self.name!r} is asked for inference, but {type(self).__name__} defines no"
            " inference(data)"
        )

    def forward_step(self, data: Batch, iteration: int = 0) -> Batch:
        return self.generate(data) if self.generates else self.inference(data)
