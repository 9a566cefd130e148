"""Files of rows, by path or URL: opened, and read whole or in part."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from rlhf_flows.errors import DataError

__all__ = ["read_file"]


def read_file(name: str) -> bytes:
    if "://" not in name:
        try:
            return Path(name).read_bytes()
        except FileNotFoundError as e:
            raise DataError(f"{name}: there is no such file{_near_file(Path(name))}") from e
        except OSError as e:
            raise DataError(f"{name} cannot be read: {e.strerror}") from e
    import fsspec  # only URLs need it

    failures: tuple[type[Exception], ...] = (OSError, ImportError, ValueError)
    failures += _errors_of_s3(name)
    try:
        with fsspec.open(name, "rb") as file:
            return bytes(file.read())
    except FileNotFoundError as e:
        raise DataError(f"{name}: there is no such object: check bucket and key") from e
    except failures as e:
        raise DataError(f"{name} cannot be read: {e}") from e


def _errors_of_s3(name: str) -> tuple[type[Exception], ...]:
    """What s3fs lets through untranslated: no credentials, no such endpoint."""
    if not name.startswith("s3://"):
        return ()
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:  # then s3fs is missing, too, and says so itself
        return ()
    return (BotoCoreError, ClientError)


def _near_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f": {path.parent} is not a folder"
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f": did you mean {path.parent / near[0]}?" if near else ""
