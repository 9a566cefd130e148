"""The client of an S3 server: how it is made, and what its errors mean."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any

import aiohttp
import s3fs
from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError
from botocore.parsers import ResponseParserError

from rlhf_flows.errors import ObjectNotFoundError, StoreError, StoreUnavailableError

__all__ = ["TRY_AGAIN_CODES", "code", "connect", "explained", "status"]

# 409: another conditional write of the same key is in flight. Not 501: it will never work.
_TRY_AGAIN = {408, 409, 429, 500, 502, 503, 504}
TRY_AGAIN_CODES = {"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"}
_NETWORK_ERRORS = (
    OSError,
    BotoCoreError,
    ResponseParserError,  # what stands before an overloaded server answers in HTML
    HTTPException,
    aiohttp.ClientError,
)


def connect() -> s3fs.S3FileSystem:
    config: dict[str, Any] = {
        "connect_timeout": 5,
        "read_timeout": 30,
        "retries": {"mode": "standard", "total_max_attempts": 1},
        # The newer default checksums are refused by servers other than AWS.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    has_endpoint = "AWS_ENDPOINT_URL" in os.environ or "AWS_ENDPOINT_URL_S3" in os.environ
    style = os.environ.get("RLHF_FLOWS_S3_ADDRESSING_STYLE") or ("path" if has_endpoint else None)
    if style is not None:
        config["s3"] = {"addressing_style": style}
    client = s3fs.S3FileSystem(
        config_kwargs=config, skip_instance_cache=True, use_listings_cache=False
    )
    client.retries = 1
    return client


@contextmanager
def explained(action: str, url: str, key: str) -> Iterator[None]:
    """Translate what s3fs, botocore and aiohttp raise into an error of ours."""
    what = f"cannot {action} {url}/{key}".rstrip("/")
    bucket = url.removeprefix("s3://").partition("/")[0]
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError, PermissionError) as error:
        raise StoreError(
            f"{what}: {_reason(error)}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and "
            "AWS_ENDPOINT_URL, unless it is AWS) for an account that may use this bucket"
        ) from error
    except FileNotFoundError as error:
        if code(error) == "NoSuchBucket" or action == "list":
            raise StoreError(
                f"{what}: there is no bucket {bucket!r} at {_endpoint()}: create it, or "
                "correct the URL or AWS_ENDPOINT_URL"
            ) from error
        if action == "read":
            raise ObjectNotFoundError(f"{what}: there is no such object") from error
        raise StoreError(f"{what}: {_answer(error)}") from error
    except _NETWORK_ERRORS as error:
        answered = status(error)
        if answered is None:
            raise StoreUnavailableError(
                f"{what}: no answer from {_endpoint()} ({error or type(error).__name__}): is "
                "it up, and is AWS_ENDPOINT_URL right?"
            ) from error
        reason = f"{what}: {_answer(error)}"
        if answered in _TRY_AGAIN or code(error) in TRY_AGAIN_CODES:
            raise StoreUnavailableError(reason) from error
        raise StoreError(reason) from error


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"


def _response(error: BaseException) -> dict[str, Any]:
    """What the server answered; empty where the error did not come from an answer."""
    response: dict[str, Any] = getattr(error.__cause__ or error, "response", None) or {}
    return response


def status(error: BaseException) -> int | None:
    number: int | None = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return number


def _answer(error: BaseException) -> str:
    return f"{_endpoint()} answered {status(error)} {_reason(error)}"


def _reason(error: BaseException) -> str:
    """The server's code, and what it says to it if it says something."""
    said = _response(error).get("Error", {}).get("Message") or ("" if code(error) else str(error))
    return f"{code(error)} ({said})" if code(error) and said else code(error) or said


def code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))
