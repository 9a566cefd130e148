"""`rlhf_flows.init()`: the configuration that engines of this process start from."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_flows.config import EngineConfig
from rlhf_flows.config_loading import load_config, read_settings
from rlhf_flows.errors import ConfigError
from rlhf_flows.services.environment import prepare_environment

__all__ = ["init", "initial_config"]

_initial: list[EngineConfig] = []


def init(
    config: EngineConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    argv: Sequence[str] | None = None,
) -> EngineConfig:
    """Reads the configuration that engines made afterwards start from, and returns it.

    Args:
        config: A YAML file, its fields as nested dicts, or a configuration. None: the file that
            `-c FILE` or `--config FILE` names on the command line, if any.
        argv: The command line; `sys.argv[1:]` by default. Words such as `runtime.num_episode=3` in
            it win over the file; other arguments are left to the program.

    Raises:
        ConfigError: a file that cannot be read, an unknown field (with the nearest right one), an
            option of ChatLearn that has no meaning here (with the reason), or a wrong value.
    """
    prepare_environment(verbose=True)
    if isinstance(config, EngineConfig):
        loaded = config
    else:
        fields: dict[str, Any] = {}
        words: list[str] = []
        if config is None:
            fields, words = _asked(sys.argv[1:] if argv is None else argv)
        elif isinstance(config, Mapping):
            fields = dict(config)
        elif isinstance(config, str | Path):
            fields = read_settings(config)
        else:
            raise ConfigError(
                f"init was given a {type(config).__name__}, expected the name of a YAML file, its"
                " fields as nested dicts, or a configuration"
            )
        loaded = load_config(EngineConfig, words, defaults=fields)
    _initial[:] = [loaded]
    return loaded


def initial_config() -> EngineConfig:
    """What `init` read last; the defaults where it was not called."""
    return _initial[-1] if _initial else EngineConfig()


def _asked(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config")
    try:
        known, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as e:
        raise ConfigError(f"the command line cannot be read: {e}") from e
    sections = tuple(f"{name}." for name in EngineConfig.model_fields)
    words = [w for w in rest if "=" in w and (w.startswith(sections) or w.split("=")[0] in _TOP)]
    return ({} if known.config is None else read_settings(known.config)), words


_TOP = frozenset(EngineConfig.model_fields)
