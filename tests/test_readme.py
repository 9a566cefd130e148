"""The README's promises: its code runs, its links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlhf_flows.models.tiny import build_tiny_qwen2

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_links_of_the_documents_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_first_sample_of_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, services: str
) -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    build_tiny_qwen2(tmp_path / "model", hidden_size=32, num_layers=1, max_position_embeddings=320)
    rows = [json.dumps({"prompt": f"say {i}", "answer": str(i)}) for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    fewer = code.replace('"num_episode": 10', '"num_episode": 1, "sample_per_episode": 16')
    assert fewer != code
    exec(compile(fewer, "README", "exec"), {})
    assert (tmp_path / "runs/my-run/episodes/episode=000000/trained.json").exists()
