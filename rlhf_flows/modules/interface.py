"""`ModelInterface`: model code by what it does, in ReaL's words: generate, inference, train_step.

A module like all others; the two first are names of what `forward_step` is to the rest of the
system. And `call_by_keys`: any module's step on some columns of a batch, under the names that the
module knows them by, which is how a graph of calls (`rlhf_flows.calls`) asks it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from rlhf_flows.data.columns import COLUMNS
from rlhf_flows.errors import ConfigError, DataError
from rlhf_flows.modules.torch_module import TorchModule

if TYPE_CHECKING:
    from rlhf_flows.data.batch import Batch
    from rlhf_flows.modules.base import BaseModule

__all__ = ["Doing", "ModelInterface", "call_by_keys"]

Doing = Literal["generate", "inference", "train_step"]

_ALWAYS = (*(c.name for c in COLUMNS if c.phase == "plan"), "policy_version")
"""What every step is given: who a sample is, and the seed that it is drawn with."""


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


def call_by_keys(
    module: BaseModule,
    data: Batch,
    *,
    step: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    known_as: Mapping[str, str],
    gives: Mapping[str, str],
) -> Batch:
    """The module's `step` on the columns `inputs`; its columns `outputs` and no others.

    Args:
        known_as: the name by which the module knows an input, where it is another one.
        gives: the name by which the module gives an output, where it is another one.

    Raises:
        DataError: an input is not in the batch, or an output not among what came back.
    """
    for name in inputs:
        if name not in data:
            raise DataError(
                f"the call of {module.name!r} needs {name!r}, which no call before it gives and no"
                f" row has{_near(name, data)}: the columns are {', '.join(sorted(data))}"
            )
    given = {name: data[name] for name in _ALWAYS if name in data}
    given |= {known_as.get(name, name): data[name] for name in inputs}
    found = getattr(module, step)(given)
    if not isinstance(found, Mapping):
        raise DataError(
            f"{step} of module {module.name!r} returned a {type(found).__name__}, expected a dict"
            " of columns"
        )
    for name in outputs:
        own = gives.get(name, name)
        if own not in found:
            raise DataError(
                f"{step} of module {module.name!r} was to give {own!r}, and gave"
                f" {', '.join(sorted(found.keys() - given.keys())) or 'nothing new'}: return it, or"
                " leave it out of the call's outputs"
            )
    return {name: found[gives.get(name, name)] for name in outputs}


def _near(name: str, data: Mapping[str, Any]) -> str:
    near = get_close_matches(name, list(data), n=1)
    return f" (nearest: {near[0]!r})" if near else ""
