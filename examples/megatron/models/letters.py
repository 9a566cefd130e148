"""What the models share: an alphabet, the table of logits, the dataset of the document.

Letters: B samples, P letters of the prompt, R letters of the response, V of the alphabet.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

NUM_LETTERS = 16
RESPONSE_LENGTH = 6


def encode(text: str) -> Tensor:  # [P]
    return torch.tensor([ord(letter) % NUM_LETTERS for letter in text])


class NextLetter(nn.Module):
    """Logits of the next letter, given the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(NUM_LETTERS, NUM_LETTERS))

    def forward(self, last: Tensor) -> Tensor:  # [...] -> [..., V]
        return self.table[last]

    def logprobs(self, query: Tensor, response: Tensor) -> Tensor:  # [B, P], [B, R] -> [B, R]
        last = torch.cat([query[:, -1:], response[:, :-1]], dim=1)
        return self(last).log_softmax(-1).gather(-1, response[..., None])[..., 0]


class ValueOfLetter(nn.Module):
    """The reward to be expected after a letter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(NUM_LETTERS))

    def forward(self, query: Tensor, response: Tensor) -> Tensor:  # [B, P], [B, R] -> [B, R]
        return self.table[torch.cat([query[:, -1:], response[:, :-1]], dim=1)]


class PromptDataset(Dataset):
    """
    A custom dataset to construct batched prompts.
    """

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, idx):
        return {"query": self.data[idx]}

    def collate_fn(self, samples):
        batched_data = {}
        for sample_key, sample_value in samples.items():
            batched_data[sample_key] = torch.stack(sample_value)
        return batched_data
