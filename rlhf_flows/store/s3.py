"""A bucket (or a folder of one) of any S3 server as a store, through s3fs. Needs the `s3` extra.

The decisions here:
- put-if-absent is one PUT with `If-None-Match: *`, sent by name: never multipart, because there
  some servers ignore the header. What counts is HTTP status 412, because each server dresses the
  error differently.
- Credentials and endpoint come from the environment (`AWS_*`, `AWS_ENDPOINT_URL`) of the process
  that uses the store: the store pickles as its URL alone.
- Nothing cached that could be stale: neither s3fs's listings nor its instances (which go on with
  old credentials). Each process builds its client on first use: a client does not survive a fork.
- Retries here are for hiccups, about three seconds' worth: whoever retries the task outlasts an
  outage. Most belong to botocore. The layer of s3fs multiplies them, so it keeps but one, for a
  body that breaks off.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import s3fs
from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError

from rlhf_flows.errors import ObjectNotFoundError, StoreError, StoreUnavailableError
from rlhf_flows.store.objects import (
    FileRecord,
    Listing,
    ObjectInfo,
    check_key,
    folder_prefix,
    list_files,
)

__all__ = ["S3Store"]

_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 8
_FILES_AT_ONCE = 4
_KEYS_PER_CALL = 1000  # the protocol's limit, of listings and of deletions
# 409: another conditional write of the same key is in flight. Not 501: it will never work.
_TRY_AGAIN = {408, 409, 429, 500, 502, 503, 504}


class S3Store:
    """Objects below `s3://bucket/prefix`."""

    def __init__(self, url: str) -> None:
        bucket, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
        if not bucket or "@" in bucket:
            raise StoreError(
                f"{url!r} is not s3://bucket/prefix: name the bucket, and give credentials in the "
                "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), never in the URL"
            )
        self.bucket = bucket
        self.prefix = folder_prefix(prefix)
        self._lock = threading.Lock()
        self._client: s3fs.S3FileSystem | None = None
        self._client_pid = 0

    def __reduce__(self) -> tuple[type[S3Store], tuple[str]]:
        return S3Store, (self.url,)

    def __repr__(self) -> str:
        return f"S3Store({self.url!r})"

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def check_usable(self) -> None:
        """One listing; `StoreError` says what is missing: server, credentials or bucket."""
        with self._explained("list", ""):
            self._call("list_objects_v2", Prefix=self.prefix, MaxKeys=1)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._explained("write", key):
            try:
                self._call("put_object", Key=self._name(key), Body=data, IfNoneMatch="*")
            except OSError as error:
                if _status(error) == 412:
                    return False
                raise
        return True

    def get(self, key: str) -> bytes:
        with self._explained("read", key):
            data: bytes = self._fs().cat_file(self._path(key), max_concurrency=1)
        return data

    def list(self, prefix: str = "") -> Listing:
        below = f"{self.prefix}{folder_prefix(prefix)}"
        infos: Listing = []
        page: dict[str, Any] = {"IsTruncated": True}
        with self._explained("list", prefix):
            while page["IsTruncated"]:
                token = page.get("NextContinuationToken")
                rest = {"ContinuationToken": token} if token else {}
                page = self._call("list_objects_v2", Prefix=below, MaxKeys=_KEYS_PER_CALL, **rest)
                infos += [
                    ObjectInfo(key=entry["Key"][len(self.prefix) :], size=entry["Size"])
                    for entry in page.get("Contents", ())
                    if not entry["Key"].endswith("/")  # what browsers of buckets call a folder
                ]
        return sorted(infos, key=lambda info: info.key)

    @contextmanager
    def working_folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="rlhf-flows-") as folder:
            yield Path(folder)

    def put_folder(self, local: Path, prefix: str) -> tuple[FileRecord, ...]:
        files = list_files(local)
        records = tuple(FileRecord.of(path, name=name) for name, path in files)
        with self._explained("write", prefix):
            self._fs().put(
                [str(path) for _, path in files],
                [self._path(f"{prefix}/{name}") for name, _ in files],
                chunksize=_PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
                batch_size=_FILES_AT_ONCE,
            )
        return records

    def get_folder(self, prefix: str, files: Sequence[FileRecord], local: Path) -> None:
        unverified = local / f".tmp-{uuid4().hex}"
        try:
            with self._explained("read", prefix):
                self._fs().get(
                    [self._path(f"{prefix}/{record.name}") for record in files],
                    [str(unverified / check_key(record.name)) for record in files],
                    batch_size=_FILES_AT_ONCE,
                )
            for record in files:
                record.verify(unverified / record.name, source=f"{self.url}/{prefix}/{record.name}")
                target = local / record.name
                target.parent.mkdir(parents=True, exist_ok=True)
                (unverified / record.name).replace(target)
        finally:
            shutil.rmtree(unverified, ignore_errors=True)

    def delete(self, keys: Iterable[str]) -> None:
        names = [{"Key": self._name(key)} for key in keys]
        for start in range(0, len(names), _KEYS_PER_CALL):
            some = names[start : start + _KEYS_PER_CALL]
            with self._explained("delete", some[0]["Key"]):
                reply = self._call("delete_objects", Delete={"Objects": some, "Quiet": True})
            if failed := reply.get("Errors"):
                raise StoreError(
                    f"cannot delete {len(failed)} objects of {self.url}, the first "
                    f"{failed[0].get('Key')} ({failed[0].get('Code')}): check that the "
                    "credentials may delete"
                )

    def sweep(self, prefix: str = "", *, older_than_s: float = 3600.0) -> int:
        """Abort multipart uploads that nobody completed (at most 1,000 a call)."""
        before = datetime.now(UTC) - timedelta(seconds=older_than_s)
        below = f"{self.prefix}{folder_prefix(prefix)}"
        with self._explained("list uploads of", prefix):
            uploads = self._call("list_multipart_uploads", Prefix=below).get("Uploads", ())
            leftovers = [upload for upload in uploads if upload["Initiated"] <= before]
            for upload in leftovers:
                self._call("abort_multipart_upload", Key=upload["Key"], UploadId=upload["UploadId"])
        return len(leftovers)

    def _name(self, key: str) -> str:
        return f"{self.prefix}{check_key(key)}"

    def _path(self, key: str) -> str:
        return f"{self.bucket}/{self._name(key)}"

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        reply: dict[str, Any] = self._fs().call_s3(method, Bucket=self.bucket, **arguments)
        return reply

    def _fs(self) -> s3fs.S3FileSystem:
        with self._lock:
            if self._client is None or self._client_pid != os.getpid():
                self._client, self._client_pid = _connect(), os.getpid()
            return self._client

    @contextmanager
    def _explained(self, action: str, key: str) -> Iterator[None]:
        """Translate what s3fs, botocore and aiohttp raise into an error of ours."""
        what = f"cannot {action} {self.url}/{key}".rstrip("/")
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError, PermissionError) as error:
            raise StoreError(
                f"{what}: {error}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and "
                "AWS_ENDPOINT_URL, unless it is AWS) for an account that may use this bucket"
            ) from error
        except FileNotFoundError as error:
            if action == "read" and _code(error) != "NoSuchBucket":
                raise ObjectNotFoundError(f"{what}: there is no such object") from error
            raise StoreError(
                f"{what}: there is no bucket {self.bucket!r} at {_endpoint()}: create it, or "
                "correct the URL or AWS_ENDPOINT_URL"
            ) from error
        except (OSError, BotoCoreError, aiohttp.ClientError) as error:
            status = _status(error)
            if status is None:
                raise StoreUnavailableError(
                    f"{what}: no answer from {_endpoint()} ({error}): is it up, and is "
                    "AWS_ENDPOINT_URL right?"
                ) from error
            reason = f"{what}: {_endpoint()} answered {status} {_code(error)} ({error})"
            if status in _TRY_AGAIN:
                raise StoreUnavailableError(f"{reason}: try again later") from error
            raise StoreError(reason) from error


def _connect() -> s3fs.S3FileSystem:
    config: dict[str, Any] = {
        "connect_timeout": 5,
        "read_timeout": 60,
        "retries": {"mode": "standard", "total_max_attempts": 3},
        # The newer default checksums are refused by servers other than AWS.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    if "AWS_ENDPOINT_URL" in os.environ or "AWS_ENDPOINT_URL_S3" in os.environ:
        config["s3"] = {"addressing_style": "path"}
    client = s3fs.S3FileSystem(
        config_kwargs=config, skip_instance_cache=True, use_listings_cache=False
    )
    client.retries = 2
    return client


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"


def _response(error: BaseException) -> dict[str, Any]:
    """What the server answered; empty where the error did not come from an answer."""
    response: dict[str, Any] = getattr(error.__cause__ or error, "response", None) or {}
    return response


def _status(error: BaseException) -> int | None:
    status: int | None = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))
