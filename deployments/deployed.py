"""The deployments of this package: one line each, from which `rlhf-flows deploy` makes them.

`prefect.yaml` says the same for `prefect deploy`, and tests/deployments/test_deployed.py holds that
both agree: a new recipe is one line here, and its entry there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import Flow

from rlhf_flows.errors import ConfigError
from rlhf_flows.registry import import_object, load_module, nearest
from rlhf_flows.services.deploying import Deployed

__all__ = ["OWN_DEPLOYMENTS", "chosen", "of_module"]

_ROOM = "rlhf_flows.deployments"
_INSTALLED = {"site-packages", "dist-packages"}

OWN_DEPLOYMENTS: tuple[Deployed, ...] = (
    Deployed(
        "quickstart",
        f"{_ROOM}.quickstart.quickstart",
        "Teach a small model to sort digits. Needs no input.",
    ),
    Deployed(
        "train",
        f"{_ROOM}.grpo.grpo",
        "GRPO on a file of prompts with a reward. Give config.model, config.prompts and"
        " config.reward.",
    ),
    Deployed(
        "train",
        f"{_ROOM}.sft.sft",
        "Supervised fine-tuning on a file of demonstrations. Give config.model and config.dataset.",
    ),
    Deployed(
        "train",
        f"{_ROOM}.reward_model.reward_model",
        "A reward model, learnt from a file of preferences. Give config.model and config.dataset.",
    ),
    Deployed(
        "train",
        f"{_ROOM}.ppo.ppo",
        "PPO with a reward model or any other reward. Give config.model, config.prompts and"
        " config.reward.",
    ),
    Deployed(
        "train",
        f"{_ROOM}.dpo.dpo",
        "DPO on a file of preferences. Give config.model and config.dataset.",
    ),
    Deployed(
        "train",
        f"{_ROOM}.online_dpo.online_dpo",
        "DPO on pairs that the policy samples and a reward ranks. Give config.model, config.prompts"
        " and config.reward.",
    ),
    Deployed(
        "run",
        f"{_ROOM}.evaluate.evaluate",
        "Old versions of a run on held-out prompts, those that are not evaluated yet. Give"
        " config.run.",
    ),
    Deployed(
        "run",
        f"{_ROOM}.generate.generate",
        "Completions of a file of prompts. Give config.model and config.prompts.",
    ),
)
"""In the order of `prefect.yaml`."""


def of_module(name: str) -> list[Deployed]:
    """Deployments `FLOW/train` of a user's flows: `package.module:flow`, or all of a module.

    Such a flow is what `Recipe.flow()` makes, or any of one's own, that stands in the module under
    a name. The folder that the module is imported from goes onto the path of the runs, unless it is
    installed.

    Raises ConfigError where it cannot be imported, or has no flow.
    """
    module_name, colon, flow_name = name.partition(":")
    if colon:
        flow: Any = import_object(name, what="flow")
        if not isinstance(flow, Flow):
            raise ConfigError(
                f"{name!r} is a {type(flow).__name__}, expected a Prefect flow: such as"
                " `mine = RECIPE.flow()` in that module"
            )
        flows = {flow_name: flow}
    else:
        module = load_module(module_name, asked_by=f"--import {name!r}")
        imported = {id(d.flow()) for d in OWN_DEPLOYMENTS if d.module in sys.modules}
        flows = {
            n: f for n, f in vars(module).items() if isinstance(f, Flow) and id(f) not in imported
        }
    if not flows:
        raise ConfigError(
            f"--import {name!r}: there is no Prefect flow in {module_name}: write"
            " `mine = RECIPE.flow()` there, or name one as package.module:flow"
        )
    folder = _import_folder(module_name)
    return [
        Deployed("train", f"{module_name}.{n}", f.description or "", import_folder=folder)
        for n, f in flows.items()
    ]


def _import_folder(module_name: str) -> str | None:
    """Where Python finds the module; None where it is installed."""
    module = sys.modules[module_name]
    file = Path(module.__file__ or "").absolute()
    if _INSTALLED & set(file.parts):
        return None
    depth = module_name.count(".") + (file.name == "__init__.py")
    return str(file.parents[depth])


def chosen(deployments: Sequence[Deployed], only: Sequence[str]) -> list[Deployed]:
    """Those that `only` names, by flow, by FLOW/NAME or by recipe; all where it names none.

    Raises ConfigError for a name that is none of them, with the nearest.
    """
    names = {n for d in deployments for n in _names(d)}
    for name in only:
        if name not in names:
            raise ConfigError(
                f"there is no deployment {name!r}{nearest(name, sorted(names))}: known are"
                f" {', '.join(d.full_name for d in deployments)}"
            )
    return [d for d in deployments if not only or _names(d) & set(only)]


def _names(deployed: Deployed) -> set[str]:
    flow = deployed.full_name.partition("/")[0]
    return {flow, deployed.full_name, deployed.entrypoint.rpartition(".")[2]}
