"""`rlhf-flows automations`: what starts crashed runs again, tells a person, pauses schedules."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from rlhf_flows.cli.application import app
from rlhf_flows.cli.server import prefect_client
from rlhf_flows.services.delays import Alerts, Delays

automations_app = typer.Typer(
    help="Automations on a Prefect server: crashed runs start again, somebody is told, schedules"
    " are paused.",
    no_args_is_help=True,
)
app.add_typer(automations_app, name="automations")
_DELAYS, _ALERTS = Delays(), Alerts()


@automations_app.command("install")
def automations_install(
    restart_s: Annotated[
        float, typer.Option(help="Seconds from a crash to the restart.", min=15)
    ] = _DELAYS.restart_s,
    heartbeat_s: Annotated[
        float, typer.Option(help="Seconds without a heartbeat that are a crash.", min=60)
    ] = _DELAYS.heartbeat_s,
    crashes_per_hour: Annotated[
        int, typer.Option(help="Crashes of one flow run that end the restarts.", min=2)
    ] = _DELAYS.crashes_per_hour,
    notify: Annotated[
        str | None,
        typer.Option(
            help="A notification block, such as slack-webhook/team: it tells of runs that failed,"
            " and of incidents.",
            show_default=False,
        ),
    ] = None,
    no_notify: Annotated[bool, typer.Option("--no-notify", help="Tells nobody any more.")] = False,
    pause_schedules: Annotated[
        bool | None,
        typer.Option(
            help="Pause the deployment of a run that a guard rail stopped, or that failed often.",
            show_default=False,
        ),
    ] = None,
    failures_a_week: Annotated[
        int, typer.Option(help="Failed runs of a deployment that pause it.", min=1)
    ] = _ALERTS.failures_a_week,
) -> None:
    """Installs them on the server of PREFECT_API_URL, or replaces them there.

    Those that notify or pause stay as they are where nothing is said of them.
    """
    from rlhf_flows.services.automations import TAG, install

    delays = Delays(restart_s=restart_s, heartbeat_s=heartbeat_s, crashes_per_hour=crashes_per_hour)
    alerts = Alerts(
        notify="" if no_notify else notify, pause=pause_schedules, failures_a_week=failures_a_week
    )
    with prefect_client() as client:
        for name in install(client, delays, alerts):
            Console().print(f"installed {name!r}, for flow runs with the tag {TAG!r}")


@automations_app.command("remove")
def automations_remove() -> None:
    """Removes them from the server."""
    from rlhf_flows.services.automations import remove

    with prefect_client() as client:
        names = remove(client)
    Console().print("\n".join(f"removed {name!r}" for name in names) or "there were none")


@automations_app.command("ls")
def automations_ls() -> None:
    """Lists those that the server has."""
    from rlhf_flows.services.automations import installed

    with prefect_client() as client:
        found = installed(client)
    for automation in found:
        is_on = "on" if automation.enabled else "off"
        Console().print(f"{automation.name} ({is_on}): {automation.description}", soft_wrap=True)
    if not found:
        Console().print("none: `rlhf-flows automations install` makes them")
