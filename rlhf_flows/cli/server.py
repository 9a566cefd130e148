"""The Prefect server that commands work on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["prefect_client"]


@contextmanager
def prefect_client() -> Iterator[Any]:
    """A client of the server that is configured. Raises ConfigError where none is, or it fails."""
    import httpx
    from prefect.client.orchestration import get_client

    from rlhf_flows.errors import ConfigError
    from rlhf_flows.services.environment import is_server_configured
    from rlhf_flows.services.prefect_server import check_configured_server

    if not is_server_configured():
        raise ConfigError(
            "no Prefect server is configured: this needs one that stays, so start it with"
            " `prefect server start` and set PREFECT_API_URL, such as http://127.0.0.1:4200/api"
        )
    check_configured_server()
    with get_client(sync_client=True) as client:
        try:
            yield client
        except httpx.HTTPStatusError as e:
            raise ConfigError(
                f"the Prefect server at {client.api_url} refuses: {e}. Check PREFECT_API_URL, and"
                " PREFECT_API_KEY or PREFECT_API_AUTH_STRING where it asks for one"
            ) from e
