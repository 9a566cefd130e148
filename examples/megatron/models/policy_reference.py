import torch

from examples.megatron.models.letters import NextLetter, PromptDataset, encode
from rlhf_flows import MegatronModule


class PolicyReference(MegatronModule):
    def __init__(self, name):
        """
        Args:
            name: model name
        """

    def setup(self):
        """
        1. define model, self.model = xxx
        2. init global variables, etc.
        3. for training model, define optimizer, self.optimizer = xxx
        4. init model parameters
        """
        self.model = NextLetter()

    @torch.no_grad()
    def forward_step(self, data, iteration=0):
        """
        Perform forward step for one batch
        Args:
            data: one batch for forward_step, type is dict
            iteration: iteration id for current step
        Returns:
            k/v dict
        """
        if "response" in data:
            return {**data, "ref_logprobs": self.model.logprobs(data["query"], data["response"])}
        # Prompts alone: of two orders of their letters, the one up the alphabet is preferred.
        query, letters = data["query"][:, :1], data["query"]
        pairs = {
            "query": query,
            "chosen": letters.sort(dim=1).values,
            "rejected": letters.sort(dim=1, descending=True).values,
        }
        logprobs = {
            f"ref_{which}": self.model.logprobs(query, pairs[which]).sum(-1)
            for which in ("chosen", "rejected")
        }
        return {**pairs, **logprobs}

    def build_dataset(self, train_prompts, is_eval=False):
        """
        Build prompt dataset. The implementation of build_dataset is exclusive to PolicyInference, whereas other models are not required to adopt it.

        Args:
            train_prompts: prompts provided by DPOEngine.set_dataset(train_prompts)
            is_eval: eval mode
        Returns:
            torch.utils.data.Dataset with user-defined collate_fn (see `Dataset`)
        """  # noqa: E501
        return PromptDataset([encode(prompt) for prompt in train_prompts])
