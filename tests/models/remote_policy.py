"""A policy in a process of its own (policy_server.py), for tests."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

SERVER = Path(__file__).with_name("policy_server.py")


class RemotePolicy:
    """A policy in another process; its methods, by name."""

    def __init__(self, socket: Path) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        with Listener(str(socket)) as listener:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", str(SERVER), str(socket)], env=environment
            )
            self._connection = listener.accept()

    def start(self, policy_class: type, **arguments: Any) -> None:
        """Makes the policy there, in place of the one before, and sets it up."""
        self._call("start", policy_class, arguments)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return partial(self._call, method)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        # Plain pickles: torch would hand over tensors through descriptors of its own.
        self._connection.send_bytes(pickle.dumps((method, args, kwargs)))
        answer = pickle.loads(self._connection.recv_bytes())
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self._connection.send_bytes(pickle.dumps(None))
        self._process.wait(timeout=60)
        self._connection.close()
