"""The rows of all sections as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["table_of"]

_COLUMNS: dict[str, tuple[str, ...]] = {
    "agreement": (
        "what", "by", "device", "dtype", "logprob", "logprob_mean", "loss", "grad_norm", "weight",
        "fine",
    ),
    "attention": (
        "what", "kernel", "forward_ms", "both_ms", "tflops", "error", "first_call_s", "failed",
    ),
    "training": (
        "by", "model", "what", "tokens", "micro_batch", "recompute", "seconds", "tokens_per_s",
        "mfu", "of_matmuls", "tflops", "peak_tflops", "peak_gib", "gb_per_s", "to_host_gb_per_s",
        "failed",
    ),
}  # fmt: skip


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """One table a kind of section; failures of whole sections before them."""
    parts: list[str] = []
    for row in rows:
        if "failed_section" in row:
            parts.append(f"**{row['section']} failed**: {row['failed_section']}")
        elif row["section"] == "machine":
            named = (f"{k} {_shown(v)}" for k, v in row.items() if k != "section" and v is not None)
            parts.append(", ".join(named))
    for kind, columns in _COLUMNS.items():
        own = [row for row in rows if _kind(row) == kind and "failed_section" not in row]
        if own:
            parts.append(_table(kind, columns, own))
    return "\n\n".join(parts) + "\n"


def _kind(row: dict[str, Any]) -> str:
    section = row["section"]
    return section if section in ("agreement", "attention", "machine") else "training"


def _table(title: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    used = [column for column in columns if any(column in row for row in rows)]
    lines = [f"## {title}", "", f"| {' | '.join(used)} |", f"|{'---|' * len(used)}"]
    lines += [f"| {' | '.join(_shown(row.get(c, '')) for c in used)} |" for row in rows]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
