"""`MegatronModule`: a model on Megatron, as ChatLearn names its base class.

What a subclass writes itself (`setup`, `forward_step`, `train_step`) runs as it is, with what
`TorchModule` gives every model that stands in `self.model`: its weights, its training state, its
data-parallel ranks. megatron-core is not imported here.
"""

from __future__ import annotations

from rlhf_flows.modules.torch_module import TorchModule

__all__ = ["MegatronModule"]


class MegatronModule(TorchModule):
    """A `TorchModule` whose `setup` builds its model with Megatron, or with anything else."""
