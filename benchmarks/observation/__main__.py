"""What it costs to watch a run: CPU-seconds of a 30 s episode with and without all observation.

    python -m benchmarks.observation [--episodes N] [--json FILE]

The same run twice, in one process: as it is, with artifacts, assets and the line of the terminal,
and with `shown` replaced by nobody. Its modules sleep, so that the process of the flow has nothing
to do but to orchestrate and to show: fifteen shards of two seconds an episode. CPU-seconds, of the
flow's process and of the Prefect server, hold on a busy machine, too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks.machine import describe_machine, one_line
from rlhf_flows.services.environment import prepare_environment

SHARDS, SHARD_S, GROUP = 15, 2.0, 4
TARGET = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of all episodes of one run, its start and its end included."""

    flow_cpu_s: float
    server_cpu_s: float
    wall_s: float
    updates: dict[str, int]
    """Uploads of each artifact, and events that were emitted."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.observation")
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    args = parser.parse_args()
    machine = describe_machine()
    print(one_line(machine), flush=True)
    prepare_environment(verbose=False)
    from rlhf_flows.services.prefect_server import prefect_api

    found: dict[str, Cost] = {}
    with tempfile.TemporaryDirectory(prefix="rlhf-flows-bench-") as folder, prefect_api() as server:
        assert server is not None, "unset PREFECT_API_URL: the server's cost is measured, too"
        server.wait()
        for name in ("warm-up", "observed", "unobserved"):
            episodes = 1 if name == "warm-up" else args.episodes
            found[name] = _run(Path(folder), name, episodes, psutil.Process(server._process.pid))
            print(f"  {name:10} {found[name]}", flush=True)
    episode_s = SHARDS * SHARD_S
    of = ("flow_cpu_s", "server_cpu_s")
    for name, parts in (*((part, (part,)) for part in of), ("both", of)):
        more = sum(getattr(found["observed"], p) - getattr(found["unobserved"], p) for p in parts)
        share = more / args.episodes / episode_s
        print(
            f"{name}: {more / args.episodes:+.3f} s an episode, {share:+.2%} of {episode_s:.0f} s"
        )
    if args.json:
        args.json.write_text(json.dumps({k: asdict(v) for k, v in found.items()}, indent=1))


def _run(folder: Path, name: str, episodes: int, server: psutil.Process) -> Cost:
    from rlhf_flows.attempt import running as attempt
    from rlhf_flows.reporting.artifacts import ArtifactProgress
    from rlhf_flows.reporting.terminal import TerminalProgress

    running: Any = attempt  # what is replaced in these is not their own
    artifacts: Any = ArtifactProgress
    updates: Counter[str] = Counter()
    is_shown = name != "unobserved"
    shown, upload, emitting = running.shown, ArtifactProgress._upload, _counted_events(updates)

    async def counted(self: ArtifactProgress, client: Any, artifact: Any, data: Any) -> None:
        updates[artifact.key] += 1
        await upload(self, client, artifact, data)

    @contextlib.asynccontextmanager
    async def nobody(*_: Any, **__: Any) -> AsyncIterator[Any]:
        from rlhf_flows.tasks import NoProgress

        yield NoProgress()

    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    with contextlib.ExitStack() as stack:
        progress = None
        if is_shown:
            progress = stack.enter_context(TerminalProgress(terminal, num_episode=episodes))
        running.shown = shown if is_shown else nobody
        artifacts._upload = counted
        stack.enter_context(emitting)
        began, flow_cpu, server_cpu = time.perf_counter(), time.process_time(), _cpu(server)
        try:
            _learn(folder, name, episodes, progress)
        finally:
            running.shown, artifacts._upload = shown, upload
        return Cost(
            flow_cpu_s=round(time.process_time() - flow_cpu, 3),
            server_cpu_s=round(_cpu(server) - server_cpu, 3),
            wall_s=round(time.perf_counter() - began, 2),
            updates=dict(updates),
        )


def _learn(folder: Path, name: str, episodes: int, progress: Any) -> None:
    from tests.end_to_end.whole_run import toy_engine

    toy_engine(slow_s=SHARD_S).learn(
        run_name=name,
        store={"url": str(folder)},
        runtime={
            "num_episode": episodes,
            "sample_per_episode": SHARDS * GROUP,
            "num_inference_per_prompt": GROUP,
            "generation_batch_size": GROUP,
        },
        progress=progress,
    )


@contextlib.contextmanager
def _counted_events(updates: Counter[str]) -> Any:
    """Counts events by name. Whatever else emits some has its line here."""
    from rlhf_flows.reporting import assets as module

    assets: Any = module  # what is replaced in it is not its own
    emit = assets.emit_event

    def counted(event: str, *args: Any, **kwargs: Any) -> Any:
        updates[event] += 1
        return emit(event, *args, **kwargs)

    assets.emit_event = counted
    try:
        yield
    finally:
        assets.emit_event = emit


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
