"""A family of models that this package does not know: registered, checked, trained.

OLMo 2 stands for any family of `transformers`: decoders whose attention goes through its interface
take a few words. `check_family` compares what is computed here with plain `transformers` and says
where they differ; the run after it is supervised fine-tuning on a tiny model, built here.

    python -m examples.custom_family --run-name olmo2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from rlhf_flows import Family, SFTEngine, check_family, register_family
from rlhf_flows.flow import RunResult
from rlhf_flows.models import SFTTrainer
from rlhf_flows.models.tiny import character_tokenizer
from rlhf_flows.services.environment import cache_folder, prepare_environment
from rlhf_flows.settings import OptimizerSettings

OLMO2 = register_family(
    Family(
        name="olmo2", causal="Olmo2ForCausalLM", scalar="Olmo2ForSequenceClassification"
    )
)  # fmt: skip


def build_tiny_olmo2(folder: Path) -> Path:
    tokenizer = character_tokenizer("0123456789+=")
    config = Olmo2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Olmo2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(run: str, store: str, *, num_episode: int = 4) -> RunResult:
    """Sums of two digits; `num_episode` times eight steps on 32 of them."""
    model = build_tiny_olmo2(cache_folder() / "custom-family-model")
    report = check_family(model)
    print(f"{report.architecture}: differs by up to {max(report.differences.values()):.0e}")
    sums = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    engine = SFTEngine(SFTTrainer(path=model, optimizer=OptimizerSettings(learning_rate=1e-2)))
    return engine.set_dataset(sums).learn(
        run_name=run,
        store={"url": store},
        runtime={
            "num_episode": num_episode,
            "sample_per_episode": 256,
            "train_global_batch_size": 32,
        },
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Trains a model of a family registered here.")
    parser.add_argument("--run-name", default="custom-family", help="the same name goes on")
    parser.add_argument("--store", default="runs", help="a folder, or s3://bucket/prefix")
    words = parser.parse_args(arguments)
    done = train(words.run_name, words.store)
    print("loss by episode:", *(f"{e['loss']:.2f}" for e in done.episodes.values()))


if __name__ == "__main__":
    prepare_environment()
    main()
