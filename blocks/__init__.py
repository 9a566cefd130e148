"""Prefect blocks: what a team configures once and every deployment of it uses.

Prefect loads this package through the `prefect.collections` entry point whenever it starts, so it
imports neither torch nor Ray. No block logs a secret, nor puts one into a configuration: they
go into the environment of the process that asks for it.
"""

from rlhf_flows.blocks.episode_store import EpisodeStore
from rlhf_flows.blocks.ray_cluster import RayCluster
from rlhf_flows.blocks.run_defaults import RunDefaults, apply_defaults

__all__ = ["EpisodeStore", "RayCluster", "RunDefaults", "apply_defaults"]
