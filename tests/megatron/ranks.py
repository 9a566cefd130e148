"""A few processes that tests use as ranks: real gloo groups on loopback, started once.

`Ranks.run` has a check of `tests/megatron/checks*.py` run by the first n of them, in a process
group of its own, and gives what each returned. A check that fails or hangs ends all processes, so
that none waits for a rank that is gone; the next run starts new ones.
"""

from __future__ import annotations

import importlib
import multiprocessing
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from typing import Any

COLLECTIVE_TIMEOUT_S = 60.0


class Ranks:
    def __init__(self, most: int = 4) -> None:
        self.most = most
        self._workers: list[tuple[Any, Connection]] = []
        self._store: Any = None
        self._runs = 0

    def run(self, check: str, *, world_size: int = 1, timeout_s: float = 120, **kwargs: Any) -> Any:
        """`check` is "module:function", called as function(**kwargs) on each rank.

        Raises AssertionError with the rank's traceback.
        """
        self._start()
        self._runs += 1
        workers = self._workers[:world_size]
        for rank, (_, pipe) in enumerate(workers):
            pipe.send((f"run{self._runs}", check, rank, world_size, kwargs))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        try:
            while len(answers) < world_size:
                open_pipes = [pipe for r, (_, pipe) in enumerate(workers) if r not in answers]
                ready = wait(open_pipes, max(0.0, deadline - time.monotonic()))
                assert ready, (
                    f"{check}: {world_size - len(answers)} ranks still run after {timeout_s} s"
                )
                for rank, (_, pipe) in enumerate(workers):
                    if pipe in ready:
                        fine, answers[rank] = pipe.recv()
                        assert fine, f"{check}, rank {rank} of {world_size}:\n{answers[rank]}"
        except (AssertionError, EOFError):
            self.stop()
            raise
        return [answers[rank] for rank in range(world_size)]

    def _start(self) -> None:
        if self._workers:
            return
        from rlhf_flows.modules.rank_group import LOOPBACK, hold_store

        self._store = hold_store(LOOPBACK)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers", "megatron.core.models.gpt"])
        for _ in range(self.most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._store.port), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def stop(self) -> None:
        for process, pipe in self._workers:
            process.kill()
            process.join(10)
            pipe.close()
        self._workers, self._store = [], None


def _serve(pipe: Connection, port: int) -> None:
    warnings.simplefilter("ignore")
    import torch
    from torch.distributed import PrefixStore

    from rlhf_flows.modules.rank_group import LOOPBACK, join_ranks, reach_store, talk_over

    torch.set_num_threads(1)
    talk_over(LOOPBACK)
    store = reach_store(LOOPBACK, port, timeout_s=COLLECTIVE_TIMEOUT_S)
    while True:
        try:
            name, check, rank, world_size, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            join_ranks(
                PrefixStore(name, store),
                rank=rank,
                world_size=world_size,
                timeout_s=COLLECTIVE_TIMEOUT_S,
            )
            module, _, function = check.partition(":")
            answer = getattr(importlib.import_module(module), function)(**kwargs)
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
            pipe.send((True, answer))
        except BaseException:  # of whatever kind: the test that asked is told
            pipe.send((False, traceback.format_exc()))
            raise
