"""Commits: put-if-absent made sure of, whatever the network says.

The decision here: "somebody else created it" is never believed from an answer alone. A reply can be
lost after the PUT took effect, and the store's retry of the same bytes then hears that something is
there. So what is there is read back and compared. A nonce makes the bytes of one commit different
from those of any other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from rlhf_flows.errors import StoreDamageError
from rlhf_flows.store.objects import ObjectStore

__all__ = ["Commit", "commit_bytes", "commit_json", "read_json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What stands at the key now, and whether it is what this call wanted to put there."""

    mine: bool
    payload: dict[str, Any]


def commit_json(store: ObjectStore, key: str, payload: dict[str, Any]) -> Commit:
    """Create the JSON object `key`, once and for all. Not mine: adopt the payload that is there.

    The payload that stands carries a `nonce`. Raises `StoreUnavailableError` when the store stays
    silent: the commit may then have happened or not, and calling again settles it.
    """
    nonce = uuid4().hex
    data = json.dumps({**payload, "nonce": nonce}, allow_nan=False, indent=1).encode()
    standing = _parse(store, key, _settle(store, key, data))
    return Commit(mine=standing.get("nonce") == nonce, payload=standing)


def commit_bytes(store: ObjectStore, key: str, data: bytes) -> bool:
    """Create an object that is its own commit, such as a shard. False: other bytes are there.

    True also when somebody else put equal bytes: then nobody can tell, and nobody needs to.
    """
    return _settle(store, key, data) == data


def read_json(store: ObjectStore, key: str) -> dict[str, Any]:
    """A committed JSON object; `ObjectNotFoundError` if there is none."""
    return _parse(store, key, store.get(key))


def _settle(store: ObjectStore, key: str, data: bytes) -> bytes:
    """Put `data` at `key` unless something is there; the bytes that stand there afterwards."""
    if store.put_if_absent(key, data):
        return data
    # Somebody's, or ours: the store repeats a PUT whose reply was lost, and then finds its object.
    return store.get(key)


def _parse(store: ObjectStore, key: str, data: bytes) -> dict[str, Any]:
    try:
        payload = json.loads(data)
    except ValueError as error:
        raise StoreDamageError(
            f"{store.url}/{key} is not JSON ({error}): something other than this system wrote it"
        ) from error
    if not isinstance(payload, dict):
        raise StoreDamageError(f"{store.url}/{key} holds a {type(payload).__name__}, not an object")
    return payload
