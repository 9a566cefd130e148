import torch

from examples.megatron.models.letters import RESPONSE_LENGTH, NextLetter, PromptDataset, encode
from rlhf_flows import VLLMModule


class PolicyInference(VLLMModule):
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
        letters = [data["query"][:, -1]]
        for _ in range(RESPONSE_LENGTH):
            probabilities = self.model(letters[-1]).softmax(-1)
            letters.append(torch.multinomial(probabilities, 1)[:, 0])
        response = torch.stack(letters[1:], dim=1)
        logprobs = self.model.logprobs(data["query"], response)
        return {"query": data["query"], "response": response, "logprobs": logprobs}

    def build_dataset(self, train_prompts, is_eval=False):
        """
        Build prompt dataset. The implementation of build_dataset is exclusive to PolicyInference, whereas other models are not required to adopt it.
        Args:
            train_prompts: prompts provided by RLHFEngine.set_dataset(train_prompts)
            is_eval: eval mode
        Returns:
            torch.utils.data.Dataset with user-defined collate_fn (see `Dataset`)
        """  # noqa: E501
        return PromptDataset([encode(prompt) for prompt in train_prompts])
