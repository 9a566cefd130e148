"""A Ray cluster of several nodes on this machine: a head without CPUs, and raylets to kill."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Node", "TestCluster", "ray_cluster"]

_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_PATIENCE_S = 120.0


class Node:
    """`ray start --block` and all that it started."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def has(self, pid: int) -> bool:
        return any(process.pid == pid for process in self._processes())

    def _processes(self) -> list[psutil.Process]:
        processes = [psutil.Process(self._process.pid)]
        with contextlib.suppress(psutil.NoSuchProcess):
            processes += processes[0].children(recursive=True)
        return processes

    def kill(self) -> None:
        """SIGKILL to every process of the node, its actors included: as if the power went."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self._process.wait(timeout=30)


class TestCluster:
    """Its head offers no CPU, so whoever asks for one is placed on the other nodes."""

    __test__ = False

    def __init__(self, folder: Path, token: str) -> None:
        self.address = f"127.0.0.1:{_free_port()}"
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        self._folder = folder
        self._nodes: list[Node] = []
        port = self.address.partition(":")[2]
        self.head = self._start(
            "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"
        )

    def add_node(self, *, num_cpus: int) -> Node:
        """Returns once the cluster has the node's CPUs."""
        before = self._num_cpus()
        node = self._start(f"--address={self.address}", f"--num-cpus={num_cpus}")
        deadline = time.monotonic() + _PATIENCE_S
        while self._num_cpus() < before + num_cpus:
            is_up = node.is_running and time.monotonic() < deadline
            assert is_up, (self._folder / "ray.log").read_text()[-3000:]
            time.sleep(0.5)
        return node

    def close(self) -> None:
        for node in reversed(self._nodes):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                node.kill()

    def _start(self, *options: str) -> Node:
        common = (
            "--block",
            "--node-ip-address=127.0.0.1",
            "--disable-usage-stats",
            f"--object-store-memory={100 << 20}",
        )
        with (self._folder / "ray.log").open("ab") as log:
            process = subprocess.Popen(
                [*_RAY, "start", *options, *common],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        node = Node(process)
        self._nodes.append(node)
        return node

    def _num_cpus(self) -> float:
        """As the cluster says, asked by a process of its own: this one may be elsewhere."""
        code = (
            "import json, logging, ray\n"
            f"ray.init({self.address!r}, logging_level=logging.ERROR, log_to_driver=False)\n"
            "print(json.dumps(ray.cluster_resources()))"
        )
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            done = subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, **self.environment},
                capture_output=True,
                text=True,
                timeout=_PATIENCE_S,
                check=False,
            )
            if done.returncode == 0:
                resources: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
                return float(resources.get("CPU", 0.0))
            assert time.monotonic() < deadline, done.stderr[-3000:]
            time.sleep(1)


@contextlib.contextmanager
def ray_cluster(folder: Path) -> Iterator[TestCluster]:
    with tempfile.TemporaryDirectory(dir=folder) as logs:
        cluster = TestCluster(Path(logs), secrets.token_hex(16))
        try:
            yield cluster
        finally:
            cluster.close()


def _free_port() -> int:
    """Outside of the range that Ray gives to its workers (10002 to 19999)."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port >= 20_000:
            return port
