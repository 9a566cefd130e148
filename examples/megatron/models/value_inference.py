import torch

from examples.megatron.models.letters import ValueOfLetter
from rlhf_flows import MegatronModule


class ValueInference(MegatronModule):
    def setup(self):
        self.model = ValueOfLetter()

    @torch.no_grad()
    def forward_step(self, data, iteration=0):
        return {"values": self.model(data["query"], data["response"])}
