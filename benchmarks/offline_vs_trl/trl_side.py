"""The other side: TRL's SFTTrainer, RewardTrainer or DPOTrainer on the same work.

Runs in a virtual environment of its own. Where TRL's defaults would make it do more or less than
the work says, they are set: no gradient checkpointing, no evaluation, nothing saved, rows in the
order of the file. What remains is its own: padding to the longest row of a batch, DPO's reference
in each step.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

from benchmarks.marks import mark
from benchmarks.offline_vs_trl.work import Work
from benchmarks.options import from_command_line


class Episodes(TrainerCallback):
    """Tells `__main__` of every episode, and what its last step measured."""

    def __init__(self, steps: int, sequences: int) -> None:
        """`sequences` of one row: a pair has two."""
        self._steps, self._sequences = steps, sequences
        self._measured: dict[str, float] = {}

    def count(self, inputs: Any, loss: torch.Tensor) -> None:
        labels = inputs.get("labels")
        mask = inputs.get("completion_mask")
        rows = len(inputs["input_ids"]) // self._sequences
        self._measured = {"loss": float(loss), "rows": rows}
        if labels is not None:
            self._measured["tokens"] = int((labels != -100).sum())
        if mask is not None:
            self._measured["tokens"] = int(mask.sum())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._steps == 0:
            number = state.global_step // self._steps - 1
            mark("step", number=number, seconds={}, metrics=self._measured)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "grad_norm" in logs:
            mark("log", metrics={"grad_norm": float(logs["grad_norm"])})


def build_trainer(work: Work, folder: str) -> Any:
    lines = Path(work.rows).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    wanted = work.rows_per_episode * (work.warmup + work.episodes)
    rows = (rows * (wanted // len(rows) + 1))[:wanted]
    dtype = getattr(torch, work.dtype)
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    settings: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": work.batch,
        "max_steps": work.steps * (work.warmup + work.episodes),
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "max_grad_norm": work.max_grad_norm,
        "bf16": work.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "seed": work.seed,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": work.steps,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    common = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    if work.what == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(work.model, dtype=dtype)
        return trl.RewardTrainer(model=model, args=trl.RewardConfig(**settings), **common)
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype)
    if work.what == "sft":
        return trl.SFTTrainer(model=model, args=trl.SFTConfig(**settings), **common)
    config = trl.DPOConfig(beta=work.beta, **settings)
    return trl.DPOTrainer(model=model, args=config, **common)


def main(work: Work) -> None:
    torch.set_num_threads(work.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(work, folder)
        episodes = Episodes(work.steps, 1 if work.what == "sft" else 2)
        trainer.add_callback(episodes)
        step = trainer.training_step

        def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = step(model, inputs, *args, **kwargs)
            episodes.count(inputs, loss)
            return loss

        trainer.training_step = counted
        mark("precision", weights=sorted({str(p.dtype) for p in trainer.model.parameters()}))
        trainer.train()


if __name__ == "__main__":
    main(from_command_line(Work))
