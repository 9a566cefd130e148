"""Weights from the ranks of a trainer into any number of replicas, bucket by bucket.

The flow's process conducts, and no weight passes through it: while the receivers load a bucket, the
next one waits at their side, and the trainer makes another only once the first is loaded by all. So
two buckets is all that the weights ever take beside the models, and no receiver waits for messages.

A receiver that fails half-way holds no version, and some engines can never be used again: it is
left behind, while the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf_flows.errors import InputLostError, NoAnswerError, SyncError, TransientError
from rlhf_flows.pools.actors import Replica
from rlhf_flows.pools.messages import WorkerState
from rlhf_flows.pools.pool import Pool

__all__ = ["NO_VERSION", "Receiver", "deliver"]

logger = logging.getLogger(__name__)

NO_VERSION = -1
"""Of a replica in the middle of a load."""

Receiver = tuple[Pool, Replica]


async def deliver(
    sender: Pool,
    receivers: Sequence[Receiver],
    *,
    version: int,
    bucket_bytes: int,
    average: str,
    committed: str,
    timeout_s: float,
) -> list[Receiver]:
    """Brings the receivers to a policy version of the sender. The caller holds them.

    Args:
        average: The module whose average of the weights is wanted; "" for the weights themselves.
        committed: sha256 of what is to be sent.
        timeout_s: For all of it.

    Returns:
        Who must get the weights elsewhere: all where the sender has moved on already, else those
        that hold NO_VERSION now, because they, or the sender, failed by a SyncError.

    Raises:
        TransientError: a rank or a receiver died, or did not answer in time. Whoever was in the
            middle of a load is given up, so that all replicas that are left hold one version: the
            old one where nothing came, else the new one.
    """
    what = f"the weights of version {version} for {_names(receivers)}"
    deadline = time.monotonic() + timeout_s
    loading = _Loading(list(receivers), version, deadline)
    args = (sender.attempt, version, bucket_bytes, average, committed)
    try:
        async with contextlib.aclosing(
            sender.stream("stream_weights", *args, what=what, timeout_s=timeout_s)
        ) as buckets:
            async for still_loading, *given in buckets:
                for bucket in given:
                    loading.give(bucket)
                    del bucket
                given.clear()
                await loading.settle(but=still_loading)
                if loading.is_over:
                    break
        await loading.settle()
    except SyncError as e:
        logger.warning("%s did not all come: %s", what, e)
        await loading.settle()
    except BaseException:  # cancelled as well: nobody is to be left in the middle of a load
        await loading.cancel()
        _give_up_unfinished(receivers)
        raise
    if loading.deaths:
        _give_up_unfinished(receivers)
        raise loading.deaths[0]
    return [receiver for receiver in receivers if receiver[1].version != version]


class _Loading:
    """Receivers, and the buckets that they were given and have not loaded yet."""

    def __init__(self, taking: list[Receiver], version: int, deadline: float) -> None:
        self._taking, self._version, self._deadline = taking, version, deadline
        self._given: deque[list[tuple[Receiver, asyncio.Future[WorkerState]]]] = deque()
        self.deaths: list[TransientError] = []
        """What receivers failed by that is no SyncError."""

    @property
    def is_over(self) -> bool:
        """Whether nobody is left to go on, or somebody is stuck."""
        return not self._taking or any(isinstance(e, NoAnswerError) for e in self.deaths)

    def give(self, bucket: Any) -> None:
        self._given.append(
            [
                (r, asyncio.ensure_future(_give(r, bucket, self._version, self._deadline)))
                for r in self._taking
            ]
        )

    async def settle(self, *, but: int = 0) -> None:
        """Waits until all but so many of the buckets are loaded, or were not."""
        while len(self._given) > but:
            given = self._given.popleft()
            answers = await asyncio.gather(*(f for _, f in given), return_exceptions=True)
            for (receiver, _), answer in zip(given, answers, strict=True):
                # Who failed before was given one more, and has nothing new to say.
                if receiver in self._taking:
                    self._note(receiver, answer)
            del given

    def _note(self, receiver: Receiver, answer: WorkerState | BaseException) -> None:
        pool, replica = receiver
        if isinstance(answer, WorkerState):
            replica.state = answer
            return
        self._taking.remove(receiver)
        if isinstance(answer, SyncError | InputLostError):  # lost: its sender failed meanwhile
            logger.warning("replica %d of pool %r: %s", replica.index, pool.name, answer)
        elif isinstance(answer, TransientError):
            logger.warning("%s", answer)  # of several, one is raised
            self.deaths.append(answer)
        else:  # a fence, or a fault of ours
            raise answer

    async def cancel(self) -> None:
        rest = [future for given in self._given for _, future in given]
        for future in rest:
            future.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


async def _give(receiver: Receiver, bucket: Any, version: int, deadline: float) -> WorkerState:
    pool, replica = receiver
    replica.state = replace(replica.state, version=NO_VERSION, clean=False)
    state: WorkerState = await pool.on_replica(
        replica,
        "receive_bucket",
        pool.attempt,
        bucket,
        what=f"loading the weights of version {version}",
        timeout_s=max(deadline - time.monotonic(), 0.0),
        waits_for_store=False,
    )
    return state


def _give_up_unfinished(receivers: Sequence[Receiver]) -> None:
    for pool, replica in receivers:
        if replica.alive and replica.version == NO_VERSION:
            pool.give_up(replica)


def _names(receivers: Sequence[Receiver]) -> str:
    return ", ".join(sorted({repr(pool.name) for pool, _ in receivers}))
