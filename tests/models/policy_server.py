"""Holds a policy in a process of its own and answers calls, for tests.

vLLM changes the process it runs in (thread settings, a process group); tests must not see that.
Usage: policy_server.py SOCKET
"""

from __future__ import annotations

import pickle
import sys
from multiprocessing.connection import Client

from rlhf_flows.modules.base import ModuleContext


def main() -> None:
    with Client(sys.argv[1]) as connection:
        policy = None
        while (request := pickle.loads(connection.recv_bytes())) is not None:
            method, args, kwargs = request
            try:
                if method == "start":
                    policy_class, arguments = args
                    policy = policy_class("policy", **arguments)
                    policy.attach(ModuleContext())
                    policy.validate()
                    policy.setup()
                    answer = None
                else:
                    answer = getattr(policy, method)(*args, **kwargs)
            except Exception as e:  # goes to the test, whatever it is
                answer = e
            connection.send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main()
