"""`DeepSpeedModule`: a model on DeepSpeed, as ChatLearn names its base class.

What a subclass writes itself (`setup`, `forward_step`, `train_step`) runs as it is, with what
`TorchModule` gives every model that stands in `self.model`. DeepSpeed is not imported here.
"""

from __future__ import annotations

from rlhf_flows.modules.torch_module import TorchModule

__all__ = ["DeepSpeedModule"]


class DeepSpeedModule(TorchModule):
    """A `TorchModule` whose `setup` builds its model with DeepSpeed, or with anything else."""
