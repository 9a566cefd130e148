"""From a path or URL to a store. s3fs is imported only when an S3 URL asks for it."""

from __future__ import annotations

from pathlib import Path

from rlhf_flows.errors import StoreError
from rlhf_flows.store.local import LocalStore
from rlhf_flows.store.objects import ObjectStore
from rlhf_flows.store.patience import BRIEF_S

__all__ = ["open_store"]


def open_store(url: str | Path, *, retry_budget_s: float = BRIEF_S) -> ObjectStore:
    """Open the store at a path, `file:///path` or `s3://bucket/prefix`, and check it is usable.

    A local folder is made if need be. A store that does not answer is waited for, now and later,
    for `retry_budget_s` at most. Raises `StoreError` that says what is wrong with it.
    """
    text = str(url)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme == "file":
        folder = Path(rest if separator else text).expanduser().absolute()
        local = LocalStore(folder, retry_budget_s=retry_budget_s)
        local.check_usable()
        return local
    if scheme == "s3":
        try:
            from rlhf_flows.store.s3 import S3Store
        except ModuleNotFoundError as error:
            raise StoreError(
                f"the store {text} needs {error.name}, which is not installed: "
                "pip install 'rlhf-flows[s3]'"
            ) from error
        remote = S3Store(text, retry_budget_s=retry_budget_s)
        remote.check_usable()
        return remote
    raise StoreError(
        f"the store {text} has the unknown scheme {scheme!r}: use a path, file:// or s3:// "
        "(any S3 server, by AWS_ENDPOINT_URL)"
    )
