"""A bucket (or a folder of one) of any S3 server as a store, through s3fs. Needs the `s3` extra.

The decisions here:
- put-if-absent is one PUT with `If-None-Match: *`, sent by name: never multipart, because there
  some servers ignore the header. What counts is HTTP status 412, because each server dresses the
  error differently.
- Credentials and endpoint come from the environment (`AWS_*`, `AWS_ENDPOINT_URL`) of the process
  that uses the store: the store pickles as its URL alone.
- Nothing cached that could be stale: neither s3fs's listings nor its instances (which go on with
  old credentials). Each process builds its client on first use: a client does not survive a fork.
- Every request is repeated by the store's patience: botocore and s3fs, whose retries would
  multiply, get one try (aiohttp makes two of it, should an open connection turn out to be dead).
  Folders go part by part, so that an outage in the middle of a large file costs a part. A repeated
  request is harmless: what a lost reply leaves is recognised.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import psutil
import s3fs

from rlhf_flows.errors import StoreError, StoreUnavailableError
from rlhf_flows.store.disk import on_disk
from rlhf_flows.store.objects import (
    FileRecord,
    Listing,
    ObjectInfo,
    check_key,
    folder_prefix,
    list_files,
)
from rlhf_flows.store.patience import BRIEF_S, Patience
from rlhf_flows.store.s3_client import TRY_AGAIN_CODES, code, connect, explained, status
from rlhf_flows.store.working import filled, remove_old

__all__ = ["S3Store"]

T = TypeVar("T")
_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 8
_FILES_AT_ONCE = 4
_KEYS_PER_CALL = 1000  # the protocol's limit, of listings and of deletions
_MOST_PARTS = 10_000  # the protocol's limit, of one upload
_WORKING = "rlhf-flows-work-"


class S3Store:
    """Objects below `s3://bucket/prefix`."""

    def __init__(self, url: str, *, retry_budget_s: float = BRIEF_S) -> None:
        bucket, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
        if not bucket or "@" in bucket:
            raise StoreError(
                f"{url!r} is not s3://bucket/prefix: name the bucket, and give credentials in the "
                "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), never in the URL"
            )
        self.bucket = bucket
        self.prefix = folder_prefix(prefix)
        self._patience = Patience(retry_budget_s)
        self._lock = threading.Lock()
        self._client: s3fs.S3FileSystem | None = None
        self._client_pid = 0

    def __reduce__(self) -> tuple[Callable[..., S3Store], tuple[str]]:
        return partial(S3Store, retry_budget_s=self._patience.budget_s), (self.url,)

    def __repr__(self) -> str:
        return f"S3Store({self.url!r})"

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def patience(self) -> Patience:
        return self._patience

    def check_usable(self) -> None:
        """One listing; `StoreError` says what is missing: server, credentials or bucket."""
        self._ask("list", "", "list_objects_v2", Prefix=self.prefix, MaxKeys=1)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        def once() -> bool:
            try:
                self._call("put_object", Key=self._name(key), Body=data, IfNoneMatch="*")
            except OSError as error:
                if status(error) == 412:
                    return False
                raise
            return True

        return self._try("write", key, once)

    def get(self, key: str) -> bytes:
        return self._get(key)

    def list(self, prefix: str = "") -> Listing:
        below = f"{self.prefix}{folder_prefix(prefix)}"
        infos: Listing = []
        page: dict[str, Any] = {"IsTruncated": True}
        while page["IsTruncated"]:
            token = page.get("NextContinuationToken")
            rest = {"ContinuationToken": token} if token else {}
            page = self._ask(
                "list", prefix, "list_objects_v2", Prefix=below, MaxKeys=_KEYS_PER_CALL, **rest
            )
            infos += [
                ObjectInfo(
                    key=entry["Key"][len(self.prefix) :],
                    size=entry["Size"],
                    modified_s=entry["LastModified"].timestamp(),
                )
                for entry in page.get("Contents", ())
                if not entry["Key"].endswith("/")  # what browsers of buckets call a folder
            ]
        return sorted(infos, key=lambda info: info.key)

    @contextmanager
    def working_folder(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(prefix=f"{_WORKING}{os.getpid()}-"))
        with filled(folder, self._patience):
            yield folder

    def put_folder(self, local: Path, prefix: str) -> tuple[FileRecord, ...]:
        files = list_files(local)
        with _threads(_FILES_AT_ONCE) as pool:
            sent = [pool.submit(self._put_file, path, f"{prefix}/{name}") for name, path in files]
            records = tuple(FileRecord.of(path, name=name) for name, path in files)
            for file in sent:
                file.result()
        return records

    def get_folder(self, prefix: str, files: Sequence[FileRecord], local: Path) -> None:
        unverified = local / f".tmp-{uuid4().hex}"

        def fetch(record: FileRecord) -> None:
            source, path = f"{prefix}/{record.name}", unverified / check_key(record.name)
            self._get_file(source, path, size=record.size)
            record.verify(path, source=f"{self.url}/{source}")
            self._on_disk(local / record.name, partial(_move, path, local / record.name))

        try:
            with _threads(_FILES_AT_ONCE) as pool:
                for fetched in [pool.submit(fetch, record) for record in files]:
                    fetched.result()
        finally:
            shutil.rmtree(unverified, ignore_errors=True)

    def delete(self, keys: Iterable[str]) -> None:
        doomed = [*keys]
        for start in range(0, len(doomed), _KEYS_PER_CALL):
            some = doomed[start : start + _KEYS_PER_CALL]
            self._try("delete", some[0], partial(self._delete, some))

    def _delete(self, keys: Sequence[str]) -> None:
        names = [{"Key": self._name(key)} for key in keys]
        reply = self._call("delete_objects", Delete={"Objects": names, "Quiet": True})
        if failed := reply.get("Errors"):
            codes = {error.get("Code") for error in failed}
            kind = StoreUnavailableError if codes <= TRY_AGAIN_CODES else StoreError
            raise kind(
                f"cannot delete {len(failed)} objects of {self.url}, the first "
                f"{failed[0].get('Key')} ({failed[0].get('Code')}): check that the "
                "credentials may delete"
            )

    def sweep(self, prefix: str = "", *, older_than_s: float = 3600.0) -> int:
        """Abort multipart uploads that nobody completed (at most 1,000 a call)."""
        before = datetime.now(UTC) - timedelta(seconds=older_than_s)
        # First: an account that may not list uploads still has a disk.
        count = remove_old(
            Path(tempfile.gettempdir()),
            _WORKING,
            before_s=before.timestamp(),
            unless=_is_of_a_living_process,
        )
        below = f"{self.prefix}{folder_prefix(prefix)}"
        found = self._ask("list uploads of", prefix, "list_multipart_uploads", Prefix=below)
        leftovers = [upload for upload in found.get("Uploads", ()) if upload["Initiated"] <= before]
        for upload in leftovers:
            self._abort({"Key": upload["Key"], "UploadId": upload["UploadId"]})
        return count + len(leftovers)

    # ---- files, part by part --------------------------------------------------------------

    def _put_file(self, path: Path, key: str) -> None:
        """A plain write, for keys that nobody else uses. Nothing is there before it is whole."""
        size = path.stat().st_size
        if size <= _PART_BYTES:
            self._ask("write", key, "put_object", Key=self._name(key), Body=path.read_bytes())
            return
        part_bytes = max(_PART_BYTES, -(-size // _MOST_PARTS))
        name = self._name(key)
        begun = self._ask("write", key, "create_multipart_upload", Key=name)
        upload = {"Key": name, "UploadId": begun["UploadId"]}

        def send(number: int) -> dict[str, Any]:
            body = _read_part(path, (number - 1) * part_bytes, part_bytes)
            part = {**upload, "PartNumber": number, "Body": body}
            return {
                "PartNumber": number,
                "ETag": self._ask("write", key, "upload_part", **part)["ETag"],
            }

        def complete() -> None:
            try:
                self._call("complete_multipart_upload", MultipartUpload={"Parts": parts}, **upload)
            except OSError as error:
                # The reply to an earlier try was lost: the upload is gone, the object there.
                if code(error) != "NoSuchUpload" or self._size(name) != size:
                    raise

        try:
            with _threads(_PARTS_AT_ONCE) as pool:
                sent = [pool.submit(send, n + 1) for n in range(-(-size // part_bytes))]
                parts = [part.result() for part in sent]
            self._try("write", key, complete)
        except BaseException:  # interrupted as well: parts that nobody completes are paid for
            with suppress(StoreError):  # `sweep` aborts it later
                self._abort(upload)
            raise

    def _abort(self, upload: dict[str, str]) -> None:
        def once() -> None:
            with suppress(FileNotFoundError):  # completed or aborted meanwhile
                self._call("abort_multipart_upload", **upload)

        self._try("abort the upload of", upload["Key"].removeprefix(self.prefix), once)

    def _size(self, name: str) -> int | None:
        """Bytes; None where there is no such object."""
        try:
            size: int = self._call("head_object", Key=name)["ContentLength"]
        except FileNotFoundError:
            return None
        return size

    def _get_file(self, key: str, path: Path, *, size: int) -> None:
        """The file as it is in the store, if of that size; any other comes out as another size."""
        self._on_disk(path, partial(_make_empty, path))
        if size <= _PART_BYTES:
            data = self._get(key)
            self._on_disk(path, lambda: path.write_bytes(data))
            return

        def fetch(start: int) -> None:
            data = self._get(key, start=start, end=min(start + _PART_BYTES, size))
            self._on_disk(path, partial(_write_part, path, start, data))

        with _threads(_PARTS_AT_ONCE) as pool:
            for fetched in [pool.submit(fetch, start) for start in range(0, size, _PART_BYTES)]:
                fetched.result()

    def _on_disk(self, path: Path, call: Callable[[], T]) -> T:
        """What `call`, which writes `path`, returns: a disk that is full is waited for."""

        def once() -> T:
            with on_disk("write", path):
                return call()

        return self._patience.keep_trying(once)

    # ---- requests -------------------------------------------------------------------------

    def _get(self, key: str, **part: int) -> bytes:
        def once() -> bytes:
            try:
                data: bytes = self._fs().cat_file(self._path(key), max_concurrency=1, **part)
            except OSError as error:
                if status(error) == 416:  # it ends before the part begins
                    return b""
                raise
            return data

        return self._try("read", key, once)

    def _ask(self, action: str, key: str, method: str, **arguments: Any) -> dict[str, Any]:
        return self._try(action, key, lambda: self._call(method, **arguments))

    def _try(self, action: str, key: str, call: Callable[[], T]) -> T:
        """What `call` returns, repeated with the store's patience; errors are of ours."""

        def once() -> T:
            with explained(action, self.url, key):
                return call()

        return self._patience.keep_trying(once)

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
                self._client, self._client_pid = connect(), os.getpid()
            return self._client


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """On an error, what has not begun does not begin."""
    with ThreadPoolExecutor(count, thread_name_prefix="s3") as pool:
        try:
            yield pool
        except BaseException:  # an interrupt, too, must not wait for all that was queued
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _make_empty(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _write_part(path: Path, start: int, data: bytes) -> None:
    """All of it, or an error: `os.pwrite` to a disk that fills up writes less, and says nothing."""
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


def _move(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)


def _read_part(path: Path, start: int, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(num_bytes)


def _is_of_a_living_process(name: str) -> bool:
    pid = name.removeprefix(_WORKING).partition("-")[0]
    return pid.isdigit() and psutil.pid_exists(int(pid))
