import torch

from examples.megatron.models.letters import ValueOfLetter
from rlhf_flows import MegatronModule


class ValueTrainer(MegatronModule):
    def setup(self):
        self.model = ValueOfLetter()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)

    def train_step(self, data, iteration):
        self.optimizer.zero_grad()
        total = 0.0
        for batch in data:
            values = self.model(batch["query"], batch["response"])
            loss = ((values - batch["rewards"][:, None]) ** 2).mean() / len(data)
            loss.backward()
            total += float(loss.detach())
        self.optimizer.step()
        return {"value_loss": total}
