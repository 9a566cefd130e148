"""What this process sets up on the machine it runs on: defaults of Prefect, a cache folder.

Called by the command line before Prefect is imported; a variable that is set already is left alone.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = [
    "PRIVATE",
    "cache_folder",
    "flow_run_url",
    "is_server_configured",
    "prepare_environment",
]

_QUIET = {
    # What goes wrong is said once, by the command line.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
}
PRIVATE = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
"""A run that somebody started by hand is reported to nobody."""


def prepare_environment(*, verbose: bool = False) -> None:
    """Sets the defaults of a run started by hand."""
    if not verbose:
        _set(_QUIET)
    _set(PRIVATE)
    _set({"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"})


def _set(defaults: dict[str, str]) -> None:
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def is_server_configured() -> bool:
    """Whether Prefect has a server to ask: by the environment, or by the profile in use."""
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())


def flow_run_url(flow_run_id: str) -> str:
    """The page of a flow run: on the server that is configured, else where `prefect server start`
    will show it.
    """
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    base = str((settings.api.url and settings.ui_url) or "http://127.0.0.1:4200").rstrip("/")
    return f"{base}/runs/flow-run/{flow_run_id}" if flow_run_id else ""


def cache_folder() -> Path:
    """Where what can be made again is kept: `$RLHF_FLOWS_CACHE`, or the user's cache folder."""
    asked = os.environ.get("RLHF_FLOWS_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    default = (Path(base) if base else Path.home() / ".cache") / "rlhf_flows"
    folder = Path(asked) if asked else default
    folder.mkdir(parents=True, exist_ok=True)
    return folder
