"""A digest of a whole Parquet file, inside the file, that other readers never see.

The decision here: page checksums cover pages, but neither page headers nor the footer with the
schema, and a shard has no second object to keep its digest in (the file is its own commit). Every
reader finds the footer from the end of the file and pages from offsets in the footer, so the gap
between the last page and the footer is free: 40 bytes there hold a magic and the SHA-256 of all
other bytes. One flipped bit anywhere is found.
"""

from __future__ import annotations

from hashlib import sha256

from rlhf_flows.errors import DataDamageError

__all__ = ["check_seal", "seal"]

_PARQUET = b"PAR1"
_MAGIC = b"RFSHA256"
_SEAL_BYTES = len(_MAGIC) + sha256().digest_size


def seal(data: bytes | memoryview) -> bytes:
    """The same Parquet file with the digest of its bytes before the footer."""
    view = memoryview(data)
    cut = _footer_start(view)
    return b"".join([view[:cut], _MAGIC, sha256(view).digest(), view[cut:]])


def check_seal(data: bytes | memoryview) -> bool:
    """Whether the file is sealed; a sealed one has been verified.

    Raises DataDamageError for what is no whole Parquet file, or not the bytes that were sealed.
    """
    view = memoryview(data)
    cut = _footer_start(view)
    start = cut - _SEAL_BYTES
    if start < len(_PARQUET) or view[start : start + len(_MAGIC)] != _MAGIC:
        return False
    digest = sha256(view[:start])
    digest.update(view[cut:])
    if digest.digest() != view[start + len(_MAGIC) : cut]:
        raise DataDamageError(
            f"a Parquet file of {len(view)} bytes is not what was written: its SHA-256 differs "
            "from the one sealed in it; replace the shard, or restore it from a copy"
        )
    return True


def _footer_start(view: memoryview) -> int:
    """Where the footer begins: the file ends with footer, its length (4 bytes), PAR1."""
    size = len(view)
    if size < 12 or view[:4] != _PARQUET or view[-4:] != _PARQUET:
        raise DataDamageError(
            f"{size} bytes that should be a Parquet file do not begin and end with PAR1: "
            "the object was cut short, or is something else"
        )
    start = size - 8 - int.from_bytes(view[-8:-4], "little")
    if start < len(_PARQUET):
        raise DataDamageError(
            f"a Parquet file of {size} bytes names a footer longer than itself: "
            "the object is damaged or was cut short"
        )
    return start
