import torch

from examples.megatron.models.letters import NextLetter
from rlhf_flows import MegatronModule


class PolicyTrainer(MegatronModule):
    def setup(self):
        """
        1. define model, self.model = xxx
        2. init global variables, etc.
        3. for training model, define optimizer, self.optimizer = xxx
        4. init model parameters
        """
        self.model = NextLetter()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)

    def train_step(self, data, iteration):
        """
        Perform train_step for one batch, including a list of micro-batches
        Args:
            data: one global batch for train_step, type is a list of dict, each dict is a micro-batch
            iteration: iteration id for current step
        """  # noqa: E501
        self.optimizer.zero_grad()
        total = 0.0
        for micro_batch in data:
            loss = self.loss(micro_batch) / len(data)
            loss.backward()
            total += float(loss.detach())
        self.optimizer.step()
        return {"policy_loss": total}

    def loss(self, batch):
        if "chosen" in batch:  # DPO: arXiv 2305.18290, eq. 7
            chosen, rejected = (
                self.model.logprobs(batch["query"], batch[which]).sum(-1) - batch[f"ref_{which}"]
                for which in ("chosen", "rejected")
            )
            return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
        logprobs = self.model.logprobs(batch["query"], batch["response"])
        advantages = batch["rewards"] - batch["rewards"].mean()
        if "values" in batch:
            advantages = batch["rewards"] - batch["values"].mean(-1)
        ratio = (logprobs - batch["logprobs"]).exp()
        gain = torch.minimum(
            ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]
        )
        return -gain.mean()
