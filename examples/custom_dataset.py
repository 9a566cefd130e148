"""A dataset of one's own, under a name of one's own: problems with steps that are to be learnt.

python -m examples.custom_dataset runtime.num_episode=3
rlhf-flows train sft model=DIR dataset.path=FILE dataset.type=examples.custom_dataset:Solutions
"""

import torch

import rlhf_flows
from rlhf_flows.models import SFTTrainer
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.services.environment import cache_folder
from rlhf_flows.settings import OptimizerSettings


class Solutions(torch.utils.data.Dataset):
    """Rows {problem, steps}: the steps, joined, are the completion."""

    def __init__(self, rows, tokenizer, *, max_tokens, separator=" "):
        self.rows, self.tokenizer, self.separator = rows, tokenizer, separator

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        prompt = self.tokenizer(row["problem"])["input_ids"]
        steps = self.tokenizer(self.separator.join(row["steps"]))["input_ids"]
        steps.append(self.tokenizer.eos_token_id)
        return {"prompt_ids": torch.tensor(prompt), "response_ids": torch.tensor(steps)}


rlhf_flows.register_dataset("solutions", Solutions)

if __name__ == "__main__":
    rlhf_flows.init()
    rows = [{"problem": f"{n}+1+1=", "steps": [f"{n + 1}+1", f"{n + 2}"]} for n in range(256)]
    model = build_tiny_qwen2(cache_folder() / "tiny", hidden_size=64, num_layers=2)
    trainer = SFTTrainer(
        path=model,
        optimizer=OptimizerSettings(learning_rate=3e-3),
        dataset="solutions",
        dataset_args={"separator": "; "},
    )
    result = rlhf_flows.SFTEngine(trainer).set_dataset(rows).learn()
    print([round(episode["loss"], 2) for episode in result.episodes.values()])
