"""A running attempt: the name claimed, the number taken, the pools opened, the phases run.

On the way out the attempt is ended and, where they cannot outlive it or nobody will need them, the
pools are released. Why it ends, and what becomes of the flow run, is told by `stopping`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import prefect
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext

from rlhf_flows.attempt.checks import check
from rlhf_flows.attempt.claims import claim_run
from rlhf_flows.attempt.deaths import check_attempts_left
from rlhf_flows.attempt.description import Checked, Dataset, Description
from rlhf_flows.attempt.names import fill_in, named_by_flow_run, new_run_name
from rlhf_flows.attempt.placement import connect_cluster, open_pools, release_left
from rlhf_flows.attempt.stopping import FlowRunWatch, started_for, without_abort
from rlhf_flows.backfill import is_backfilled, run_backfill
from rlhf_flows.errors import ConfigError, StoreUnavailableError
from rlhf_flows.flow import RunResult, is_finished, run_episodes
from rlhf_flows.pools import Pool, watch_head
from rlhf_flows.reporting.artifacts import FanOut, shown
from rlhf_flows.reporting.events import RunEvents
from rlhf_flows.reporting.flow_run_page import close_task_runs, warnings_shown
from rlhf_flows.services.heartbeat import heartbeats
from rlhf_flows.services.prefect_server import check_configured_server, kept_prefect_api
from rlhf_flows.store import (
    Outcome,
    end_attempt,
    scan,
    sweep_run,
    take_attempt,
)
from rlhf_flows.tasks.backfill import Backfill
from rlhf_flows.tasks.guarding import check_rails
from rlhf_flows.tasks.runtime import DatasetInfo, Runtime
from rlhf_flows.tasks.weights import SyncPair
from rlhf_flows.together import beside

__all__ = ["run_as_flow"]


async def run_as_flow(description: Description) -> RunResult:
    """Runs as a Prefect flow run, or as part of the flow run that this is called in."""
    flow_run = _flow_run()
    if flow_run is not None:
        started = await started_for(flow_run)
        async with heartbeats(started):
            checked = await asyncio.to_thread(check, description)
            return await run_attempt(checked, flow_run, started)

    checked = await asyncio.to_thread(check, description)
    await asyncio.to_thread(check_configured_server)
    run = fill_in(description.config.run_name or new_run_name(description.name))
    config = description.config.model_copy(update={"run_name": run})
    checked = replace(checked, description=replace(description, config=config))
    # A name that is taken, or a store that cannot be written, is known before anything starts.
    await asyncio.to_thread(claim_run, checked, run)
    # The cluster starts while Prefect does.
    cluster = asyncio.create_task(connect_cluster(checked))

    @prefect.flow(name=description.name, flow_run_name=run, persist_result=False)
    async def episodes() -> RunResult:
        """The five phases, episode by episode."""
        await cluster
        flow_run = _flow_run()
        assert flow_run is not None
        return await run_attempt(checked, flow_run, flow_run)

    try:
        with kept_prefect_api() as server, without_abort():
            if server is not None:
                await asyncio.to_thread(server.wait)
            result: RunResult = await episodes()
    finally:
        cluster.cancel()
    return result


def _flow_run() -> FlowRun | None:
    context = FlowRunContext.get()
    return None if context is None else context.flow_run


async def run_attempt(checked: Checked, flow_run: FlowRun, started: FlowRun) -> RunResult:
    """One attempt of the run: whatever is missing, from what the store holds.

    Args:
        flow_run: Whose tasks the phases are.
        started: What a person or an automation stops and starts: the same, or a parent of it.
    """
    config, flow_run_id = checked.config, str(flow_run.id)
    evaluator, backfill = checked.description.evaluator, checked.description.backfill
    is_done, work = (is_finished, run_episodes) if backfill is None else _BACKFILL
    run = named_by_flow_run(config.run_name or f"{checked.description.name}-{flow_run_id}", started)
    store, record = await asyncio.to_thread(claim_run, checked, run)
    await check_attempts_left(store, run, max_attempts=config.runtime.max_attempts)
    cluster = await connect_cluster(checked)
    attempt = await asyncio.to_thread(
        take_attempt,
        store,
        run,
        flow_run_id=str(started.id),
        changed=record.changed,
        takeover=checked.description.takeover,
    )
    await close_task_runs(flow_run)
    # Nobody waits for it, and nothing comes of it but space.
    threading.Thread(target=sweep_run, args=(store, run), name="sweep", daemon=True).start()
    if checked.description.progress is not None:
        checked.description.progress.begin(run, config.runtime.num_episode)

    async def runtime(pools: Mapping[str, Pool], sizes: Mapping[str, tuple[int, ...]]) -> Runtime:
        return Runtime(
            config=config,
            run=run,
            attempt=attempt.number,
            store=store,
            state=await asyncio.to_thread(scan, store, run if backfill is None else backfill.run),
            pools=pools,
            environment=checked.environment,
            rollout_nodes=checked.rollout,
            scoring_nodes=checked.scoring,
            trainer=checked.trainer,
            evaluator=checked.evaluator,
            syncs=checked.syncs if backfill is None else _follows(backfill),
            dataset=_built(checked.dataset, sizes.get("train")),
            eval_dataset=_built(checked.eval_dataset, sizes.get("eval")),
            post_process=None if evaluator is None else evaluator.post_process,
            only_evaluates=checked.description.only_evaluates or backfill is not None,
            backfill=backfill,
        )

    watch = FlowRunWatch(started, store=store, run=run, attempt=attempt.number)
    keeps = partial(watch.keeps_pools, on_cancel=config.cluster.keep_pools_on_cancel)
    outcome: Outcome = "failed"
    try:
        found = await runtime({}, {})
        name, listener = checked.description.name, checked.description.progress
        events = RunEvents(run, url=store.url, flow_run=started)
        also = events if listener is None else FanOut(events, listener)
        shows = shown(found, name=name, flow_run_id=flow_run_id, also=also)
        async with shows as progress, beside(watch.watch()), warnings_shown():
            found.progress = progress
            if not found.only_evaluates:
                # Before anything is loaded for a run that would stop where it did.
                await check_rails(found, trained_episodes=found.state.trained_episodes)
            if is_done(found):
                result = await work(found)
                await release_left(checked, store, run, attempt.number, cluster)
            else:
                # A backfill begins with what the run began with, however far that has come.
                resumes = backfill is None and found.state.trained_episodes > 0
                opened = open_pools(
                    checked, store, run, attempt.number, cluster, resumes=resumes, keeps=keeps
                )
                async with opened as (pools, sizes):
                    # Looked at again, after the pools are claimed: what an older attempt had in
                    # flight is there now.
                    working = await runtime(pools, sizes)
                    working.progress = progress
                    async with beside(watch_head(cluster)):
                        result = await work(working)
        outcome = "completed"
        return replace(result, flow_run_id=flow_run_id)
    except BaseException as e:
        if isinstance(e, StoreUnavailableError):
            store.patience.exhaust()  # it was waited for; the end is recorded if it is back
        outcome = await watch.outcome_of(e)
        await watch.tell(e)
    finally:
        await asyncio.shield(asyncio.to_thread(end_attempt, store, run, attempt.number, outcome))


_BACKFILL = is_backfilled, run_backfill


def _follows(backfill: Backfill) -> tuple[SyncPair, ...]:
    return (SyncPair(source=backfill.module, target=backfill.follower),)


def _built(dataset: Dataset | None, sizes: tuple[int, ...] | None) -> DatasetInfo | None:
    """The dataset as the modules built it, where that is known: items need not be rows."""
    if dataset is None or sizes is None:
        return None if dataset is None else dataset.info
    info = dataset.info
    if info.lengths and sum(sizes) != len(info.lengths):
        raise ConfigError(
            f"batch_generation.ranking goes by the rows of the dataset, {len(info.lengths)}, but"
            f" the module made {sum(sizes)} items of them: leave ranking out"
        )
    return replace(info, num_rows=sum(sizes), parts=sizes if info.parts else ())
