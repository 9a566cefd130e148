"""Whether the device computes what the CPU does: logprobs, loss, gradient norm and weights after
one step, of the same weights and texts, by torch and by Megatron.

The reference is torch on the CPU in float32. In float32 a device differs by rounding alone; in
bfloat16 by what bfloat16 costs, which torch on the CPU in bfloat16 tells.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.decoders import SIZES, joined_alone
from benchmarks.learners import Learner, MegatronLearner, TorchLearner, batch_of, mixed_texts
from rlhf_flows.data.batch import Batch
from rlhf_flows.modules.hf_folder import HFFolder

__all__ = ["measure_agreement"]

TOKENS, LONGEST, MICRO_BATCH = 1500, 300, 600
LIMITS = {"float32": 1e-4, "bfloat16": 0.05}
"""Of the mean difference of a logprob, of the loss, and of the relative gradient norm."""


def measure_agreement(device: str, *, rehearsal: bool) -> Iterator[dict[str, Any]]:
    """One row a trainer, layout, device and dtype."""
    torch.backends.cuda.matmul.allow_tf32 = False
    shape = SIZES["toy" if rehearsal else "25M"]
    alone = mixed_texts(TOKENS, longest=LONGEST)
    siblings = [(p, r) for p, r in mixed_texts(TOKENS // 4, longest=LONGEST) for _ in range(4)]
    vocabulary = shape.vocabulary_size
    works: list[tuple[str, str, Batch]] = [
        ("texts", "sft", batch_of(alone, vocabulary_size=vocabulary)),
        ("siblings", "grpo", batch_of(siblings, vocabulary_size=vocabulary, siblings=4)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for what, algorithm, batch in works:
            common: dict[str, Any] = {"algorithm": algorithm, "micro_batch_tokens": MICRO_BATCH}
            torch.manual_seed(0)
            plain = TorchLearner(shape, dtype=torch.float32, layout="padded", **common)
            weights = {n: w.clone().contiguous() for n, w in plain.named_weights()}
            _save(weights, Path(folder))
            exact = _measured(plain, batch)
            for where in dict.fromkeys(("cpu", device)):
                for dtype in (torch.float32, torch.bfloat16):
                    options: dict[str, Any] = {"dtype": dtype, "device": where, **common}
                    about = {"what": what, "device": where, "dtype": str(dtype)[6:]}
                    options["weights"] = HFFolder(folder)
                    learner = TorchLearner(shape, **options)
                    yield {**about, "by": "torch", **_differences(learner, batch, exact, about)}
                    with joined_alone(where) as topology:
                        megatron = MegatronLearner(shape, topology, **options)
                        yield {
                            **about,
                            "by": "megatron",
                            **_differences(megatron, batch, exact, about),
                        }


def _save(weights: dict[str, Tensor], folder: Path) -> None:
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))


def _measured(learner: Learner, batch: Batch) -> dict[str, Any]:
    logprobs = torch.cat(learner.logprobs(batch)).float()
    metrics = learner.step(batch)
    return {
        "logprobs": logprobs,
        "loss": metrics["loss"],
        "grad_norm": metrics["grad_norm"],
        "weights": {n: w.detach().float().cpu().clone() for n, w in learner.named_weights()},
    }


def _differences(
    learner: Learner, batch: Batch, exact: dict[str, Any], about: dict[str, str]
) -> dict[str, Any]:
    found = _measured(learner, batch)
    if isinstance(learner, MegatronLearner):
        found["logprobs"] = _in_order(found["logprobs"], learner, batch)
    off = (found["logprobs"] - exact["logprobs"]).abs()
    row = {
        "logprob": float(off.max()),
        "logprob_mean": float(off.mean()),
        "loss": abs(found["loss"] - exact["loss"]),
        "grad_norm": abs(found["grad_norm"] / exact["grad_norm"] - 1.0),
        "weight": max(
            float((w - found["weights"][n]).abs().max()) for n, w in exact["weights"].items()
        ),
    }
    limit = LIMITS[about["dtype"]]
    fine = max(row["logprob_mean"], row["loss"], row["grad_norm"]) <= limit
    return {**row, "fine": fine}


def _in_order(flat: Tensor, learner: MegatronLearner, batch: Batch) -> Tensor:
    """Logprobs of micro-batches, as the batch has its samples."""
    order = [i for part in learner.rows(batch) for i in part]
    pieces = flat.split([len(batch["response_ids"][i]) for i in order])
    placed = dict(zip(order, pieces, strict=True))
    return torch.cat([placed[i] for i in range(len(order))])
