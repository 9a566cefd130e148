"""What can go wrong, as a tree of exceptions. No dependency, no torch, no Ray.

The decision here: an error is a *user's mistake* (`UserError`: fix the input, exit code 2, never
retried), a *transient fault* (`TransientError`: the task retries it), or neither. Every class takes
one message, so that it pickles across processes with nothing lost; `raise ... from cause` carries
the cause.
"""

from __future__ import annotations

__all__ = [
    "AttemptsExhaustedError",
    "ConfigError",
    "DataDamageError",
    "DataError",
    "FencedError",
    "GraphError",
    "GuardRailError",
    "InputLostError",
    "NoAnswerError",
    "NonFiniteError",
    "NotBegunError",
    "ObjectNotFoundError",
    "PoolError",
    "QuarantineError",
    "RankLostError",
    "ReplicaDiedError",
    "ResourcesError",
    "RewardError",
    "RlhfFlowsError",
    "RunBusyError",
    "RunCancelledError",
    "RunConflictError",
    "ShardDamageError",
    "ShardError",
    "SiblingFailedError",
    "StoreDamageError",
    "StoreError",
    "StoreProbeError",
    "StoreUnavailableError",
    "SyncError",
    "TransientError",
    "UserError",
    "WaitTimeoutError",
]


class RlhfFlowsError(Exception):
    """The root: everything this package raises on purpose."""


class UserError(RlhfFlowsError):
    """The input is wrong. Never retried; the command line exits with code 2."""


class TransientError(RlhfFlowsError):
    """The world failed (a process, a node, a network). Worth another try on repaired pools."""


class ConfigError(UserError):
    """A configuration that cannot run."""


class DataError(UserError):
    """Prompts, samples or columns that cannot be used."""


class GraphError(UserError):
    """A flow function that cannot be traced into a graph."""


class GuardRailError(RlhfFlowsError):
    """A run that was stopped by a guard rail (`runtime.stop_if`). A person has to look first; what
    was committed is kept, and the message names the last good checkpoint."""


class NonFiniteError(GuardRailError):
    """Training met a loss or gradient that is not finite; the weights were left as they are."""


class QuarantineError(UserError):
    """More samples end or hang their worker than may be left out of an episode."""


class RewardError(UserError):
    """A reward function that cannot be imported, raises, or returns something unusable."""


class RunConflictError(UserError):
    """A run name that already belongs to another configuration."""


class RunBusyError(UserError):
    """A run whose newest attempt is alive."""


class ResourcesError(UserError):
    """The cluster or the machine has less than what was asked for."""


class ShardError(UserError):
    """User code failed on a shard: module, method, shard, sample and cause in one message."""


class StoreError(RlhfFlowsError):
    """The object store cannot be used as asked."""


class StoreUnavailableError(StoreError, TransientError):
    """The store did not answer, or answered that it cannot now. Another try may well succeed."""


class StoreProbeError(StoreError, UserError):
    """The store does not hold its promise of put-if-absent."""


class ObjectNotFoundError(StoreError):
    """No object under this key."""


class StoreDamageError(StoreError):
    """An object's size or digest is not the committed one."""


class DataDamageError(RlhfFlowsError):
    """Bytes that should be a shard and are not."""


class ShardDamageError(DataDamageError):
    """A committed shard whose bytes are not those that were written."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key
        """Of the shard in the store. It travels in `__dict__`, as every attribute of an error."""


class FencedError(RlhfFlowsError):
    """A newer attempt of the run took over. Terminal: never retried."""


class RunCancelledError(RlhfFlowsError):
    """The run was cancelled in Prefect. Never retried; starting again resumes."""


class AttemptsExhaustedError(RlhfFlowsError):
    """A run whose attempts die one after the other. A person has to look first."""


class PoolError(RlhfFlowsError):
    """A pool of actors cannot do what was asked."""


class ReplicaDiedError(PoolError, TransientError):
    """A replica of a pool died while it worked."""


class SiblingFailedError(PoolError):
    """Another rank of the replica failed at what all of them did together; the message says how.
    All of them are through with it, and in step.
    """


class RankLostError(TransientError):
    """A rank of a replica waited for another one that is gone or stuck; the message names it."""


class SyncError(PoolError):
    """Weights did not arrive as they were sent."""


class WaitTimeoutError(TransientError):
    """A wait ended without what it waited for; the message names it."""


class NoAnswerError(WaitTimeoutError):
    """A replica that was given work did not answer in time."""


class NotBegunError(WaitTimeoutError):
    """Work that no replica began: none came free, or none got ready. Says nothing of the work."""


class InputLostError(NotBegunError):
    """A reference that the work was given is lost: what it stood for may be in the store."""
