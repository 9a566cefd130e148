"""Leaves samples out of an episode: each blame is written down before the shard that does without.

How a culprit is found is in `bisection`; which samples go with it, and what is left of shards and
batches, in `rlhf_flows.data.quarantine`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence

from rlhf_flows.data.quarantine import Blamed
from rlhf_flows.errors import QuarantineError
from rlhf_flows.store import commit_json
from rlhf_flows.tasks.bisection import Failure
from rlhf_flows.tasks.dispatch import Blame
from rlhf_flows.tasks.runtime import EpisodeData, Runtime

__all__ = ["blame_in_episode", "refuse_more", "tell_blamed"]

logger = logging.getLogger(__name__)


def blame_in_episode(runtime: Runtime, data: EpisodeData, phase: str) -> Blame:
    """Whoever is blamed in a phase of an episode is recorded in the store, and left out."""

    async def blame(culprits: Mapping[str, Failure]) -> Collection[str]:
        new = [
            Blamed(sample_id=name, phase=phase, module=failure.module, cause=failure.cause)
            for name, failure in culprits.items()
        ]
        where = f"episode {data.plan.episode} of run {runtime.run!r}"
        async with data.blaming:
            refuse_more(runtime, where, [*data.quarantine.blamed, *new])
            await runtime.check_fence()
            for record in new:
                await _record(runtime, data, record)
        return {sibling for name in culprits for sibling in data.quarantine.siblings(name)}

    return blame


def refuse_more(runtime: Runtime, where: str, blamed: Sequence[Blamed]) -> None:
    """Raises QuarantineError, which names all of them, if there are more than may be left out."""
    limit = runtime.config.runtime.max_quarantined
    if len(blamed) > limit:
        listed = "; ".join(map(str, blamed))
        raise QuarantineError(
            f"{where}: {len(blamed)} samples end or hang their worker again and again, more than"
            f" runtime.max_quarantined={limit}: {listed}. Mend the module or take these prompts"
            " out; or raise runtime.max_quarantined, and the run goes on without them"
        )


async def _record(runtime: Runtime, data: EpisodeData, blamed: Blamed) -> None:
    """The record that stands is what counts, whoever wrote it."""
    plan, generation = data.plan, data.plan_generation
    key = runtime.layout.quarantine(plan.episode, blamed.sample_id, generation)
    payload = {**blamed.to_json(), "attempt": runtime.attempt}
    commit = await asyncio.to_thread(commit_json, runtime.store, key, payload)
    standing = Blamed.from_json(commit.payload)
    data.quarantine.add(standing)
    logger.warning("run %s: quarantined, with its group: %s", runtime.run, standing)
    tell_blamed(runtime, standing, episode=plan.episode)


def tell_blamed(runtime: Runtime, blamed: Blamed, **where: int) -> None:
    """As an incident."""
    runtime.incident(
        "quarantine",
        f"left out, with its group: {blamed}",
        sample=blamed.sample_id,
        phase=blamed.phase,
        module=blamed.module,
        **where,
    )
