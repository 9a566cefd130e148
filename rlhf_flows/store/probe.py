"""Does this store keep its promise of put-if-absent? A race finds out, before anything runs on it.

The decision here: a real race, not one call. One known server answers a second PUT with 412 as it
should and still lets two simultaneous ones both win; another ignores the header altogether.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

from rlhf_flows.errors import StoreProbeError
from rlhf_flows.store.local import LocalStore
from rlhf_flows.store.objects import ObjectStore

__all__ = ["probe_put_if_absent"]

_NUM_CLIENTS = 4
_NUM_KEYS = 24
_NUM_LOCAL_KEYS = 1  # `link` is exclusive or missing; there is no server that could be hasty


def probe_put_if_absent(store: ObjectStore) -> None:
    """Let several clients race for some keys; `StoreProbeError` unless each key has one winner.

    Writes below `.probe/` and removes it again.
    """
    num_keys = _NUM_LOCAL_KEYS if isinstance(store, LocalStore) else _NUM_KEYS
    stem = f".probe/{uuid4().hex}"
    keys = [f"{stem}-{number:02d}" for number in range(num_keys)]
    clients = [copy.copy(store) for _ in range(_NUM_CLIENTS)]  # a copy has its own connections
    bids = [f"client {number} of {stem}".encode() for number in range(_NUM_CLIENTS)]
    try:
        with ThreadPoolExecutor(_NUM_CLIENTS, thread_name_prefix="probe") as pool:
            for key in keys:
                puts = [
                    pool.submit(client.put_if_absent, key, bid)
                    for client, bid in zip(clients, bids, strict=True)
                ]
                winners = [bid for put, bid in zip(puts, bids, strict=True) if put.result()]
                _check(store, key, winners, bids)
    finally:
        store.delete(keys)


def _check(store: ObjectStore, key: str, winners: Sequence[bytes], bids: Sequence[bytes]) -> None:
    standing = store.get(key)
    # No winner is possible: its reply was lost, and the client's own retry found its object.
    if len(winners) > 1:
        found = (
            f"{len(winners)} of {len(bids)} simultaneous writers of one object were told they won"
        )
    elif standing not in (winners or bids):
        found = "the object does not hold what the one winner wrote"
    else:
        return
    raise StoreProbeError(
        f"the store {store.url} does not hold put-if-absent (If-None-Match: *): {found}. Two "
        "processes of one run could each train on samples of their own: use another store, or "
        "accept that only one process ever writes, with store.single_writer=true"
    )
