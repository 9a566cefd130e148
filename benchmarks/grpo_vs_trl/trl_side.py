"""The other side: TRL's GRPOTrainer on the same work. Runs in a virtual environment of its own.

Where TRL's defaults would make it do more or less than the work says, they are set: no gradient
checkpointing, no evaluation, nothing saved, prompts in the order of the file. It generates with
transformers, its only sampler for CPU.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.grpo_vs_trl.work import Work, digit_share
from benchmarks.marks import mark
from benchmarks.options import from_command_line


class Timers:
    """Seconds spent in named methods, nested ones counted in the outer as well."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, method: str, name: str | Callable[..., str]) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            key = name if isinstance(name, str) else name(*args, **kwargs)
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[key] += time.perf_counter() - started

        setattr(owner, method, timed)


class Steps(TrainerCallback):
    """Tells `__main__` of every step."""

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._number = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = self._timers.seconds
        self._number = state.global_step
        mark(
            "step",
            number=state.global_step,
            seconds={
                "rollout": seconds["generation"],
                "scoring": seconds["rewards"] + seconds["reference"],
                "training": seconds["training_step"] - seconds["inputs"],
            },
            metrics={},
        )
        seconds.clear()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "reward" in logs:
            keep = {k: float(logs[k]) for k in ("reward", "kl", "grad_norm") if k in logs}
            mark("log", number=state.global_step, metrics=keep)


def _rewards(completions: list[str], **_: Any) -> list[float]:
    return [digit_share(c) for c in completions]


def main(work: Work) -> None:
    torch.set_num_threads(work.threads)
    lines = Path(work.prompts).read_text(encoding="utf-8").splitlines()
    rows = [{"prompt": json.loads(line)["prompt"]} for line in lines]
    wanted = work.prompts_per_step * (work.steps + work.warmup)
    rows = (rows * (wanted // len(rows) + 1))[:wanted]
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=getattr(torch, work.dtype))
    tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    timers = Timers()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=work.micro_batch,
            gradient_accumulation_steps=work.samples_per_step // work.micro_batch,
            generation_batch_size=work.samples_per_step,
            num_generations=work.samples,
            max_completion_length=work.new_tokens,
            generation_kwargs={"min_new_tokens": work.new_tokens},
            temperature=1.0,
            beta=work.kl_coef,
            loss_type="grpo",
            scale_rewards="group",
            num_iterations=1,
            learning_rate=work.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=work.max_grad_norm,
            optim="adamw_torch",
            adam_beta2=0.999,
            weight_decay=0.0,
            max_steps=work.warmup + work.steps,
            bf16=work.dtype == "bfloat16",
            gradient_checkpointing=False,
            shuffle_dataset=False,
            use_cpu=True,
            seed=work.seed,
            save_strategy="no",
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=_rewards,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Steps(timers)],
        )

        def which(passed: Any, *_: Any, **__: Any) -> str:
            return "reference" if passed is trainer.ref_model else "policy"

        timers.wrap(trainer, "_generate_single_turn", "generation")
        timers.wrap(trainer, "_calculate_rewards", "rewards")
        timers.wrap(trainer, "_prepare_inputs", "inputs")
        timers.wrap(trainer, "training_step", "training_step")
        timers.wrap(trainer, "_get_per_token_logps_and_entropies", which)
        dtypes = {str(p.dtype) for p in trainer.model.parameters()}
        reference = {str(p.dtype) for p in trainer.ref_model.parameters()}
        mark("precision", weights=sorted(dtypes), reference=sorted(reference))
        trainer.train()


if __name__ == "__main__":
    main(from_command_line(Work))
