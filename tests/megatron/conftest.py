from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.megatron.agreement import CHECKS, SCALAR, Plain
from tests.megatron.ranks import Ranks
from tests.megatron.tiny_decoders import VARIANTS
from tests.models.families.tiny_families import build


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pytest.importorskip("megatron.core")
    started = Ranks()
    yield started
    started.stop()


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a variant, built when first asked for. Read it, never write into it."""
    built: dict[str, Path] = {}

    def folder(variant: str) -> Path:
        if variant not in built:
            built[variant] = build(tmp_path_factory.mktemp("decoder"), *VARIANTS[variant])
        return built[variant]

    return folder


@pytest.fixture(scope="session")
def scalar_folder(
    decoder_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """As `decoder_folder`, of the model with a scalar head that was made from the variant."""
    built: dict[str, Path] = {}

    def folder(variant: str) -> Path:
        if variant not in built:
            from rlhf_flows.models.causal_lm import load_tokenizer
            from rlhf_flows.models.scalar_model import load_scalar_model

            source, built[variant] = decoder_folder(variant), tmp_path_factory.mktemp("scalar")
            load_scalar_model(source, head_init="small").save_pretrained(built[variant])
            load_tokenizer(source).save_pretrained(built[variant])
        return built[variant]

    return folder


@pytest.fixture(scope="session")
def plain(
    ranks: Ranks,
    decoder_folder: Callable[[str], Path],
    scalar_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Plain:
    """Steps of the torch trainer on padded rows, and the file of the weights they led to."""
    trained: dict[str, tuple[list[dict[str, float]], str]] = {}

    def train(variant: str, algorithm: str = "sft") -> tuple[list[dict[str, float]], str]:
        key = f"{variant} by {algorithm}"
        if key not in trained:
            folder = (scalar_folder if algorithm in SCALAR else decoder_folder)(variant)
            file = str(tmp_path_factory.mktemp("plain") / "model.safetensors")
            (log,) = ranks.run(
                f"{CHECKS}:plain_training",
                folder=str(folder),
                algorithm=algorithm,
                weights_file=file,
            )
            trained[key] = log, file
        return trained[key]

    return train
