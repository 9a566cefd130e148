"""What a person does in Prefect's UI, in a real browser: fill in the form, run, look, retry.

One run tells it all. Pictures for the docs are taken on the way, into the folder that
SCREENSHOTS names: `SCREENSHOTS=docs/images make test-browser`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from PIL import Image
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.utilities.callables import parameter_schema

from rlhf_flows.deployments.grpo import grpo
from tests.deployments import toy_flow
from tests.deployments.worker import (
    deploy_toy,
    in_state,
    process_worker,
    wait_for,
    wait_for_worker,
)

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LOADS_WITHIN_MS = 60_000


@pytest.fixture(scope="module")
def browser(ray_head: str) -> Iterator[Any]:
    """An installed Chromium, without a window.

    Its loop stays in this thread: what starts by one of its own, as the Ray head, starts before.
    """
    from playwright.sync_api import sync_playwright

    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail(
            f"no Chromium is installed, looked for {', '.join(BROWSERS)}: install one (on Debian"
            " apt install chromium), or name it, CHROMIUM=/path/to/chromium"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, client: SyncPrefectClient) -> Iterator[Any]:
    """A window on the UI of the server."""
    base = str(client.api_url).removesuffix("/").removesuffix("/api")
    context = browser.new_context(base_url=base, viewport={"width": 1200, "height": 900})
    context.set_default_timeout(LOADS_WITHIN_MS)
    yield context.new_page()
    context.close()


def picture(page: Any, name: str, tmp_path: Path) -> None:
    """What is seen now, in 128 colours: a third of the bytes, and no difference to the eye."""
    file = Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"{name}.png"
    page.wait_for_timeout(1000)  # pictures and curves of the page are drawn
    page.screenshot(path=file)
    with Image.open(file) as image:
        image.convert("RGB").quantize(128).save(file, optimize=True)


def open_form(page: Any, deployment: UUID) -> None:
    page.goto(f"/deployments/deployment/{deployment}/run")
    page.get_by_role("button", name="Submit").wait_for()


def field(page: Any, title: str) -> Any:
    """The field of this title; of a section in a section, the inner one."""
    label = page.locator(".schema-form-property__label", has_text=re.compile(f"^{title}"))
    return page.locator(".schema-form-property").filter(has=label).last


def fill(page: Any, title: str, text: str) -> None:
    field(page, title).locator("input, textarea").first.fill(text)


def test_the_form_of_grpo_asks_for_three_things_and_names_a_mistake(
    page: Any, client: SyncPrefectClient, tmp_path: Path
) -> None:
    form = parameter_schema(grpo)
    deployment = client.create_deployment(
        client.create_flow_from_name("grpo"),
        name="train",
        parameter_openapi_schema=form.model_dump_for_openapi(),
        enforce_parameter_schema=True,
    )
    open_form(page, deployment)
    labels = page.locator(".schema-form-property__label").all_inner_texts()
    assert [text for text in labels if "(Optional)" not in text] == [
        "config", "Model", "Prompts", "Reward",
    ]  # fmt: skip
    assert labels[1:4] == ["Model", "Prompts", "Reward"]
    fill(page, "Model", "models/my-model")
    fill(page, "Prompts", "prompts.jsonl")
    fill(page, "Reward", "my_package.rewards:score")
    page.set_viewport_size({"width": 1200, "height": 1500})
    picture(page, "form", tmp_path)

    field(page, "Schedule of the learning rate").locator(".p-select-button__icon").click()
    page.locator(".p-select-option", has_text="cosine").click()
    page.get_by_role("button", name="Submit").click()
    page.get_by_text("'total_steps' is a required property").first.wait_for()
    assert client.read_flow_runs() == []

    fill(page, "Steps of the schedule", "20")
    page.get_by_role("button", name="Submit").click()
    sent = wait_for("the run", lambda: next(iter(client.read_flow_runs()), None), timeout_s=60)
    config = sent.parameters["config"]
    assert config["optimizer"]["total_steps"] == 20
    assert config["reward"] == "my_package.rewards:score"
    client.delete_flow_run(sent.id)


def test_a_run_of_the_form_is_watched_fails_and_resumes_by_the_button(
    page: Any, client: SyncPrefectClient, ray_head: str, tmp_path: Path
) -> None:
    repair, store = tmp_path / "repaired", tmp_path / "runs"
    deployment = deploy_toy(client, "digits", form=parameter_schema(toy_flow.digits))
    with process_worker(tmp_path / "worker.log"):
        open_form(page, deployment)
        fill(page, "Digit to prefer", "7")
        fill(page, "File of the repair", str(repair))
        fill(page, "Number of episodes", "12")
        fill(page, "Completions per episode", "64")
        fill(page, "Address of the Ray head", ray_head)
        fill(page, "Address of the store", str(store))
        page.get_by_role("button", name="Submit").click()
        flow_run = wait_for("the run", lambda: first_run(client, deployment), timeout_s=60)

        page.goto(f"/runs/flow-run/{flow_run.id}")
        page.get_by_text("Running", exact=True).first.wait_for(timeout=240_000)
        failed = wait_for("the failure", lambda: in_state(client, flow_run.id, "FAILED"))
        assert failed.state is not None
        assert "make repaired, and retry the run" in str(failed.state.message)
        page.get_by_text("Failed", exact=True).first.wait_for()
        trained = {p: p.read_bytes() for p in store.glob("*/episodes/*/trained.json")}
        assert trained

        wait_for_worker(client, flow_run.id)  # whose report of a retry's first process would count
        repair.touch()
        page.get_by_role("button", name="Retry").first.click()
        page.get_by_role("dialog").get_by_role("button", name="Retry").click()
        done = wait_for("the end", lambda: in_state(client, flow_run.id, "COMPLETED"))
        assert done.run_count == 2
        assert len(list(store.glob("*/episodes/*/trained.json"))) == 12
        assert all(path.read_bytes() == before for path, before in trained.items())
        page.get_by_text("Completed", exact=True).first.wait_for()
        page.reload()  # the graph shows the whole run
        page.get_by_text("Completed", exact=True).first.wait_for()
        page.wait_for_timeout(3000)
        picture(page, "run", tmp_path)

        page.get_by_text("Artifacts", exact=True).last.click()
        page.get_by_text("digits-curves").first.wait_for()
        page.set_viewport_size({"width": 1200, "height": 1200})
        picture(page, "artifacts", tmp_path)


def first_run(client: SyncPrefectClient, deployment: UUID) -> FlowRun | None:
    found = [run for run in client.read_flow_runs() if run.deployment_id == deployment]
    return found[0] if found else None
