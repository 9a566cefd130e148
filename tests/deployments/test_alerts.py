"""A guard rail stops a deployed run: events arrive, somebody is told, the schedule is paused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.schedules import CronSchedule

from rlhf_flows.errors import ConfigError
from rlhf_flows.services.automations import install, installed, remove
from rlhf_flows.services.delays import Alerts, Delays
from rlhf_flows.services.event_names import FINISHED, INCIDENT, RUN, STARTED
from tests.deployments.worker import deploy_toy, history, in_state, process_worker, wait_for
from tests.end_to_end.whole_run import RUNTIME

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

BLOCK = "custom-webhook/tells-the-test"


class Mailbox(ThreadingHTTPServer):
    """Takes notifications."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Post)
        self.received: list[dict[str, str]] = []


class _Post(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Mailbox)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(json.loads(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def mailbox(client: SyncPrefectClient) -> Iterator[Mailbox]:
    """What the block BLOCK of the server sends to."""
    with Mailbox() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        block = CustomWebhookNotificationBlock(
            name="of a test",
            url=f"http://127.0.0.1:{server.server_port}/",
            json_data={"subject": "{{subject}}", "body": "{{body}}"},
        )
        block.save(BLOCK.partition("/")[2], overwrite=True)
        yield server
        server.shutdown()


def events_of(client: SyncPrefectClient, run: str) -> list[dict[str, Any]]:
    """Those of a run that the server has, in order."""
    asked = {"filter": {"resource": {"id": [f"{RUN}{run}"]}, "order": "ASC"}, "limit": 50}
    found: list[dict[str, Any]] = client.request("POST", "/events/filter", json=asked).json()[
        "events"
    ]
    return found


def test_a_guard_rail_pauses_the_schedule_and_tells_why(
    client: SyncPrefectClient, ray_head: str, mailbox: Mailbox, tmp_path: Path
) -> None:
    install(client, Delays(), Alerts(notify=BLOCK, pause=True))
    deployment = deploy_toy(client)
    nightly = CronSchedule(cron="0 3 * * *", timezone="UTC")
    client.create_deployment_schedules(deployment, [(nightly, True)])
    assert not client.read_deployment(deployment).paused
    parameters = {
        "store": str(tmp_path),
        "cluster": {"address": ray_head},
        "log": str(tmp_path / "calls"),
        "slow_s": 0.0,
        "runtime": {**RUNTIME, "stop_if": {"reward_below": 2.0, "for_episodes": 2}},
    }
    with process_worker(tmp_path / "worker.log"):
        flow_run_id = client.create_flow_run_from_deployment(deployment, parameters=parameters).id
        failed = wait_for("the end", lambda: in_state(client, flow_run_id, "FAILED", "COMPLETED"))
        assert failed.state is not None
        assert "guard rail runtime.stop_if.reward_below" in (failed.state.message or "")
        assert "Crashed" not in history(client, flow_run_id)
        wait_for(
            "the pause", lambda: client.read_deployment(deployment).paused or None, timeout_s=60
        )
        wait_for("the message", lambda: mailbox.received or None, timeout_s=60)
    (message,) = mailbox.received
    assert message["subject"] == f"rlhf-flows: toy / {failed.name} failed"
    assert "reward is below 2 (episode 0: reward" in message["body"]
    assert str(flow_run_id) in message["body"]

    events = events_of(client, f"toy-{flow_run_id}")
    names = {event["event"] for event in events}
    assert names == {STARTED, FINISHED, f"{INCIDENT}guard-rail"}
    done = [e["payload"] for e in events if e["event"] == FINISHED]
    trained = [p for p in done if p["phase"] == "training"]
    assert [p["episode"] for p in trained] == [0, 1]
    assert {"run", "seconds", "metrics"} <= trained[0].keys()
    assert trained[0]["metrics"].keys() >= {"loss", "reward"}
    (stop,) = [e for e in events if e["event"] == f"{INCIDENT}guard-rail"]
    assert stop["payload"]["setting"] == "runtime.stop_if.reward_below"
    related = {r["prefect.resource.id"]: r["prefect.resource.role"] for r in stop["related"]}
    assert related[f"prefect.flow-run.{flow_run_id}"] == "flow-run"
    assert related[f"prefect.deployment.{deployment}"] == "deployment"
    assert related["prefect.tag.rlhf-flows"] == "tag"


def test_alerts_stay_where_nothing_is_said_of_them_and_go_where_they_are_refused(
    client: SyncPrefectClient, mailbox: Mailbox
) -> None:
    def names() -> list[str]:
        return [a.name.removeprefix("rlhf-flows: ") for a in installed(client)]

    restarts = ["give up", "heartbeat", "restart"]
    notify = ["notify of failures", "notify of incidents"]
    pause = ["pause after failures", "pause at guard rail"]
    remove(client)
    install(client, Delays())
    assert names() == restarts
    install(client, Delays(), Alerts(notify=BLOCK, pause=True))
    before = installed(client)
    assert names() == sorted([*restarts, *notify, *pause])
    install(client, Delays(), Alerts(notify=BLOCK, pause=True))
    install(client, Delays())
    assert [a.id for a in installed(client)] == [a.id for a in before]
    install(client, Delays(), Alerts(pause=True, failures_a_week=5))
    changed = [a.name for a, b in zip(before, installed(client), strict=True) if a.id != b.id]
    assert changed == ["rlhf-flows: pause after failures"]
    assert "5 runs" in next(a.description for a in installed(client) if "after" in a.name)
    install(client, Delays(), Alerts(notify=""))
    assert names() == sorted([*restarts, *pause])
    install(client, Delays(), Alerts(pause=False))
    assert names() == restarts
    with pytest.raises(ConfigError, match="no block 'slack-webhook/nobody'"):
        install(client, Delays(), Alerts(notify="slack-webhook/nobody"))
    assert names() == restarts, "nothing was changed"
