from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_flows.models.families import family
from tests.models.families.tiny_families import VARIANTS, build


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a variant, built when first asked for. Read it, never write into it."""
    built: dict[str, Path] = {}

    def folder(variant: str) -> Path:
        if variant not in built:
            built[variant] = build(tmp_path_factory.mktemp("family"), *VARIANTS[variant])
        return built[variant]

    return folder


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest, folder_of: Callable[[str], Path]) -> Path:
    """The folder of each variant in turn."""
    return folder_of(request.param)


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(family._FAMILIES, "_registered", {})
    monkeypatch.setattr(family, "_REGISTERED", {})
