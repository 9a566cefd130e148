"""The Ray cluster that holds the actor pools, as a block.

It has no namespace: each run has one of its own, by its name, so that its next attempt finds its
pools and no other run can (`pools.actors.namespace_of`).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import ClassVar

from prefect.blocks.core import Block
from pydantic import Field, HttpUrl, SecretStr, model_validator

from rlhf_flows.config import ClusterConfig, RuntimeEnvConfig
from rlhf_flows.errors import PoolError, ResourcesError

__all__ = ["RayCluster"]

_REACH_S = 10.0
_ASK = """
import asyncio, json, sys
from rlhf_flows.config import ClusterConfig
from rlhf_flows.errors import PoolError
from rlhf_flows.pools import connect
try:
    cluster = asyncio.run(connect(ClusterConfig.model_validate_json(sys.argv[1])))
except PoolError as e:
    sys.exit(str(e))
print(json.dumps(dict(cluster.resources)))
"""


class RayCluster(Block):
    """
    The Ray cluster that runs the models. Without an address each run starts a head of its own on
    the machine of the worker, which ends with the run.

    Attributes:
        address: Where the head's control service listens.
        token: The cluster's authentication token.
        token_path: A file that holds the token.
        runtime_env: What the workers' processes need beside what is installed.
        required_resources: What `check` expects of the cluster.
        lease_seconds: How long pools outlive their last sign of life.
        keep_pools_on_cancel: Whether those of a cancelled run do.

    Example:
        Train on a cluster that runs already:
        ```python
        from rlhf_flows.blocks import RayCluster

        cluster = RayCluster.load("BLOCK_NAME")
        cluster.export_credentials()
        config = {"cluster": cluster.to_config().model_dump()}
        ```
    """

    _block_type_name: ClassVar[str | None] = "RLHF Ray Cluster"
    _block_type_slug: ClassVar[str | None] = "rlhf-ray-cluster"
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl("https://github.com/ray-project.png?size=200")
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl(
        "https://docs.ray.io/en/latest/ray-security/token-auth.html"
    )

    address: str | None = Field(
        default=None,
        title="Address",
        description="host:port of a running head; none starts a local one that ends with the run.",
    )
    token: SecretStr | None = Field(
        default=None, title="Token", description="Authentication token of the cluster."
    )
    token_path: str | None = Field(
        default=None,
        title="Token path",
        description="File on the worker's machine that holds the token, in place of the token.",
    )
    runtime_env: RuntimeEnvConfig = Field(
        default_factory=RuntimeEnvConfig,
        title="Runtime environment",
        description="What the workers' processes need beside what is installed: packages, modules,"
        " a folder to run in.",
    )
    required_resources: dict[str, float] = Field(
        default_factory=dict,
        title="Required resources",
        description='What the check expects of the cluster, by Ray\'s names, such as {"GPU": 8}.',
    )
    num_cpus: int | None = Field(
        default=None,
        ge=1,
        title="CPUs",
        description="CPUs that a local head offers; all of the machine by default.",
    )
    object_store_memory_bytes: int = Field(
        default=1 << 30,
        ge=80 << 20,
        title="Object store memory",
        description="Bytes of shared memory of a local head's object store.",
    )
    lease_seconds: float = Field(
        default=900.0,
        gt=0,
        title="Lease",
        description="Pools without a heartbeat for so many seconds release their GPUs.",
    )

    keep_pools_on_cancel: bool = Field(
        default=False,
        title="Keep pools on cancel",
        description="Keep the pools of a cancelled run until their lease ends.",
    )

    @model_validator(mode="after")
    def _one_token(self) -> RayCluster:
        if self.token is not None and self.token_path is not None:
            raise ValueError("token and token_path are both given: leave one of them out")
        return self

    def to_config(self) -> ClusterConfig:
        """The `cluster` part of a run's configuration. Holds no secret."""
        return ClusterConfig(
            address=self.address,
            num_cpus=self.num_cpus,
            object_store_memory_bytes=self.object_store_memory_bytes,
            lease_s=self.lease_seconds,
            keep_pools_on_cancel=self.keep_pools_on_cancel,
        )

    def export_credentials(self) -> None:
        """Puts the token into the environment of this process, where Ray looks for it."""
        os.environ.update(self._credentials())

    def _credentials(self) -> dict[str, str]:
        if self.token is not None:
            return {"RAY_AUTH_TOKEN": self.token.get_secret_value()}
        return {} if self.token_path is None else {"RAY_AUTH_TOKEN_PATH": self.token_path}

    def check(self, *, timeout_s: float = 150.0) -> dict[str, float]:
        """Connects, and returns the cluster's resources.

        In a process of its own, because a process can be connected to one cluster only. Without an
        address a local head is started, and ends again.

        Raises:
            PoolError: no head answers at the address, or it takes another token.
            ResourcesError: it has less than `required_resources`.
        """
        self._check_reachable()
        config = self.to_config().model_dump_json()
        try:
            asked = subprocess.run(
                [sys.executable, "-c", _ASK, config],
                env={**os.environ, **self._credentials()},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as e:
            raise PoolError(
                f"the Ray cluster at {self.address or 'this machine'} did not answer within"
                f" {timeout_s:g} s: check the address, and that the head runs"
            ) from e
        if asked.returncode:
            said = asked.stderr.strip().splitlines()
            raise PoolError(said[-1] if said else f"exit code {asked.returncode}, nothing said")
        resources: dict[str, float] = json.loads(asked.stdout.splitlines()[-1])
        for name, wanted in self.required_resources.items():
            if (found := resources.get(name, 0.0)) < wanted:
                raise ResourcesError(
                    f"the Ray cluster at {self.address or 'this machine'} has {found:g} {name},"
                    f" required_resources says {wanted:g}: add nodes, or lower it"
                )
        return resources

    def _check_reachable(self) -> None:
        """Ray itself tries for a minute before it gives up on an address where nobody listens."""
        host, separator, port = (self.address or "").rpartition(":")
        if not separator or not port.isdigit() or "/" in host:
            return
        try:
            socket.create_connection((host, int(port)), timeout=_REACH_S).close()
        except OSError as e:
            raise PoolError(
                f"nobody listens at {self.address} ({e}): check that the head of the Ray cluster"
                " runs and that this machine reaches it"
            ) from e
