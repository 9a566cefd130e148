from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
