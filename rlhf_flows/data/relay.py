"""Relay: what training of an episode takes, chosen from the samples of the last episodes.

The function is the user's; it runs in the trainer's worker, once an episode, on samples read from
the store. The decision here: it must be a function of its argument (its random numbers are seeded),
so that an episode that is trained again takes the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_flows.data.batch import Batch, Samples, collate
from rlhf_flows.errors import DataError

__all__ = ["EpisodeRelayBuffer", "RelaySampleManager", "relayed"]


@dataclass(frozen=True, slots=True)
class EpisodeRelayBuffer:
    """The scored samples of one episode, in the order of its plan, less those in quarantine."""

    episode_id: int
    buffer: Sequence[dict[str, Any]]
    """A dict for each sample: the columns of rollout and scoring."""

    def __len__(self) -> int:
        return len(self.buffer)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.buffer)


class RelaySampleManager:
    """A relay function as a class, as ChatLearn has it: override `__call__`."""

    def __init__(self, args: Any = None) -> None:
        self.args = args

    def __call__(self, episode_relay_buffers: Sequence[EpisodeRelayBuffer]) -> list[dict[str, Any]]:
        """Samples to be trained on, in order.

        Args:
            episode_relay_buffers: The last `runtime.max_relay_episode` episodes, the newest last.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no __call__")


def relayed(relay: Any, buffers: Sequence[EpisodeRelayBuffer], *, expected: int | None) -> Batch:
    """What `relay` makes of the buffers, as one batch.

    `expected`: the number of samples that it must return, where the stream is fixed. Raises
    DataError for what is no list of samples, or another number of them.
    """
    found = relay(list(buffers))
    if not isinstance(found, list | tuple) or not all(isinstance(s, dict) for s in found):
        raise DataError(
            f"the relay function returned {_kind(found)}, expected a list of samples, each a dict"
            " as in the buffers that it was given"
        )
    if not found:
        raise DataError(
            "the relay function returned no samples: return at least one, or set"
            " runtime.relay_episode_offset to begin with a later episode"
        )
    if expected is not None and len(found) != expected:
        raise DataError(
            f"the relay function returned {len(found)} samples, the stream is fixed at {expected}"
            " (runtime.sample_per_episode): return as many, or set"
            " runtime.stream_data_loader_type=dynamic"
        )
    return collate(Samples(found))


def _kind(found: Any) -> str:
    if isinstance(found, list | tuple):
        odd = next(type(s).__name__ for s in found if not isinstance(s, dict))
        return f"a list with a {odd}"
    return f"a {type(found).__name__}"
