"""What a run does right now, as a few lines of Markdown: phases under way, samples, time to go.

The decision here: moments rather than durations ("since 14:03:07 UTC", "ends about 14:20 UTC"). The
page is sent when something changed, and what it says has to stay true until the next time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rlhf_flows.reporting.pace import in_words

__all__ = ["Now", "Work", "page", "waits_for"]

_UNITS = {"training": "steps", "param_sync": "samplers", "evaluation": "shards"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One phase that is under way."""

    phase: str
    number: int
    """Its episode, or its policy version."""
    done: int
    total: int
    since: float
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """All that the page says."""

    percent: float
    trained: int
    """Episodes that are through."""
    num_episode: int
    samples: int
    """Made so far, by this and earlier attempts."""
    sample_per_episode: int
    work: Sequence[Work]
    left_s: float | None
    samples_per_s: float | None
    at: float
    """Seconds since the epoch."""
    stopped_by: str = ""
    """What ended the run before its end."""
    headline: Mapping[str, float]
    """Newest metrics worth a mention."""


def page(now: Now) -> str:
    """The page, without anything that has to be fetched from elsewhere."""
    lines = [f"## {_state(now)}", "", _bar(now.percent), ""]
    if now.work:
        lines += ["| phase | of | done | waits for | since |", "|---|---|---|---|---|"]
        lines += [*(_row(work, now) for work in now.work), ""]
    elif not now.stopped_by and now.percent < 100:
        lines += ["Models are loading." if now.percent == 0 else "Between two phases.", ""]
    lines += [f"**Samples** {now.samples:,} of {now.num_episode * now.sample_per_episode:,}"]
    if now.samples_per_s is not None:
        lines[-1] += f", {_rate(now.samples_per_s)} per second over the last episodes"
    if now.headline:
        shown = ", ".join(f"{n.replace('_', ' ')} {v:.4g}" for n, v in now.headline.items())
        lines += ["", f"**Episode {now.trained}** {shown}"]
    lines += ["", f"*As of {_clock(now.at, now=now)}*"]
    return "\n".join(lines)


def waits_for(work: Work, others: Sequence[Work]) -> str:
    """The phase that has to give something first; "" where it works by itself, or is through."""
    if work.done >= work.total:
        return ""
    before = {"scoring": "rollout", "training": "scoring"}.get(work.phase)
    for other in others:
        if other.phase == before and other.number == work.number:
            share = other.done / max(1, other.total)
            if work.done / max(1, work.total) >= share:
                return other.phase
    return ""


def _state(now: Now) -> str:
    of = f"{now.trained} of {now.num_episode} episodes"
    if now.percent >= 100:
        return f"Done: {of}"
    if now.stopped_by:
        return f"Stopped after {of}: {now.stopped_by}"
    if now.left_s is None:
        return f"{of}, time to go known after the next"
    ends = _clock(now.at + now.left_s, now=now, form="%H:%M")
    return f"{of}, about {in_words(now.left_s)} to go (ends {ends})"


def _bar(percent: float) -> str:
    full = round(percent / 4)
    return f"`{'█' * full}{'░' * (25 - full)}` {percent:.1f} %"


def _row(work: Work, now: Now) -> str:
    name = work.phase.replace("_", " ")
    of_version = work.phase in ("param_sync", "evaluation")
    of = f"version {work.number}" if of_version else f"episode {work.number + 1}"
    if work.phase in _UNITS:
        done = f"{work.done} of {work.total} {_UNITS[work.phase]}"
    else:
        samples = round(work.done / max(1, work.total) * now.sample_per_episode)
        done = f"{samples:,} of {now.sample_per_episode:,} samples"
    waits = waits_for(work, now.work).replace("_", " ")
    return f"| **{name}** | {of} | {done} | {waits} | {_clock(work.since, now=now)} |"


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.2g}"


def _clock(at: float, *, now: Now, form: str = "%H:%M:%S") -> str:
    """With its day where that is not today's."""
    moment, today = (datetime.fromtimestamp(t, UTC) for t in (at, now.at))
    day = "" if moment.date() == today.date() else "%b %d "
    return moment.strftime(f"{day}{form} UTC")
