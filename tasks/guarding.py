"""Looks at each committed episode, tells what looks wrong, and stops the run at a guard rail.

The decision here: an episode is judged between its commit and whatever follows from it, so that
nothing is committed after the episode that a rail stopped. Judged again before a resumed run loads
anything: it stops as it did, until the rail is changed.
"""

from __future__ import annotations

import asyncio
import logging

from rlhf_flows.errors import GuardRailError, NonFiniteError
from rlhf_flows.tasks.guard_rails import (
    Trained,
    alarms,
    bad_since,
    broken,
    episodes_looked_at,
)
from rlhf_flows.tasks.runtime import Runtime

__all__ = ["check_rails", "held_version", "judge", "look_back", "stopped_by_nan"]

logger = logging.getLogger(__name__)


async def judge(runtime: Runtime, episode: int) -> None:
    """After the commit of an episode. Raises GuardRailError as `check_rails`."""
    history = await look_back(runtime, episode + 1)
    if episode == runtime.state.trained_episodes:  # the first of this attempt
        _warn_of_unknown(runtime, history)
    is_stopped = broken(runtime.config.runtime.stop_if, history) is not None
    for alarm in alarms(history):
        if alarm.kind == "nan" and is_stopped:
            continue  # said once, by what stops the run
        logger.warning("run %s: %s", runtime.run, alarm.what)
        runtime.incident(alarm.kind, alarm.what, episode=episode, **alarm.facts)
    await check_rails(runtime, trained_episodes=episode + 1)


async def check_rails(runtime: Runtime, *, trained_episodes: int) -> None:
    """Raises GuardRailError where the last of so many trained episodes breaks a rail."""
    stop_if = runtime.config.runtime.stop_if
    found = broken(stop_if, await look_back(runtime, trained_episodes))
    if found is None:
        return
    measured = runtime.sampling_version(found.first_bad)
    good = _newest_kept(runtime, measured - 1)
    where = f"runtime.stop_if.{found.setting}"
    runtime.incident(
        "guard-rail",
        found.what,
        setting=where,
        episode=trained_episodes - 1,
        first_bad_episode=found.first_bad,
        version=trained_episodes,
        last_good_version=good,
        values=dict(found.values),
    )
    raise GuardRailError(
        f"run {runtime.run!r} was stopped after episode {trained_episodes - 1} by its guard rail"
        f" {where}: {found.what}. {_next_steps(runtime, good)}"
        f" To go on where it stopped, from version {trained_episodes}, start it again with"
        f" run_name={runtime.run} and another {where}"
    )


async def stopped_by_nan(runtime: Runtime, episode: int, error: NonFiniteError) -> NonFiniteError:
    """The same of a loss or gradient that is not finite: such an episode is never committed."""
    good = _newest_kept(runtime, episode)
    what = str(error)
    runtime.incident(
        "guard-rail",
        what,
        setting="runtime.stop_if.nan",
        episode=episode,
        first_bad_episode=episode,
        version=episode,
        last_good_version=good,
        values={},
    )
    return NonFiniteError(
        f"{what}. {_next_steps(runtime, good)} Started again by its name, the run trains episode"
        f" {episode} again, on the same samples"
    )


async def held_version(runtime: Runtime, newest: int) -> int | None:
    """The version that would be the last good one if the run were stopped soon: retention keeps it.

    None where no rail is set that looks at more than one episode's fate: the rail `nan` alone keeps
    nothing.
    """
    stop_if = runtime.config.runtime.stop_if
    if not stop_if.rails():
        return None
    first_bad = bad_since(stop_if, await look_back(runtime, newest))
    good = runtime.sampling_version(newest if first_bad is None else first_bad) - 1
    return good if good > 0 else None


async def look_back(runtime: Runtime, trained_episodes: int) -> list[Trained]:
    """The commits that decide, in order; read once."""
    count = episodes_looked_at(runtime.config.runtime.stop_if)
    versions = range(max(1, trained_episodes - count + 1), trained_episodes + 1)
    commits = await asyncio.gather(*(runtime.weights.commit_of(v) for v in versions))
    return [Trained.of(commit) for commit in commits]


def _newest_kept(runtime: Runtime, version: int) -> int:
    """The newest version up to `version` that has its weights; 0 is what the run began with."""
    lost = runtime.weights.versions_without_weights()
    return next((v for v in range(version, 0, -1) if v not in lost), 0)


def _next_steps(runtime: Runtime, good: int) -> str:
    if good == 0:
        return (
            "No trained version is from before that: the last good one is version 0, what the run"
            " began with, so begin another run with other settings."
        )
    run, url = runtime.run, runtime.config.store.url
    return (
        f"The last good checkpoint is version {good}: `rlhf-flows export {run} --version {good}"
        f" --to FOLDER --store {url}` takes it out, `rlhf-flows train RECIPE --init-from"
        f" {run}@{good} store.url={url} ...` begins a run of other settings from it."
    )


def _warn_of_unknown(runtime: Runtime, history: list[Trained]) -> None:
    for setting, rail in runtime.config.runtime.stop_if.rails():
        if not any(trained.values(rail.metric) for trained in history):
            logger.warning(
                "runtime.stop_if.%s looks at %r, which training does not measure, so it never stops"
                " the run: known are %s",
                setting,
                rail.metric,
                ", ".join(sorted(history[-1].metrics)),
            )
