"""The files for Docker and Kubernetes: readable, whole, and of the versions of the lock.

`make check-infra` lints them by hadolint and kubernetes-validate, which know nothing of KubeRay and
Prefect: the fields that these insist on are looked for here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "infra/kubernetes"
DOCKER = ROOT / "infra/docker"
IMAGE = "rlhf-flows:latest"


def locked(package: str) -> str:
    lock = (ROOT / "locks/linux-x86_64-cpu.txt").read_text("utf-8")
    found = re.search(rf"^{package}==(\S+)$", lock, re.MULTILINE)
    assert found is not None, package
    return found[1]


def documents() -> Iterator[dict[str, Any]]:
    for path in sorted(KUBERNETES.glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text("utf-8"))


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = (d for d in documents() if d["kind"] == kind)
    return found


def pods() -> dict[str, dict[str, Any]]:
    """Specifications of all pods, by what they are for."""
    ray = of_kind("RayCluster")["spec"]
    template = json.loads((KUBERNETES / "base-job-template.json").read_text("utf-8"))
    return {
        "head": ray["headGroupSpec"]["template"]["spec"],
        **{g["groupName"]: g["template"]["spec"] for g in ray["workerGroupSpecs"]},
        "worker": of_kind("Deployment")["spec"]["template"]["spec"],
        "flow": template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"],
    }


def test_every_document_says_what_it_is() -> None:
    kinds = [d["kind"] for d in documents()]
    assert sorted(kinds) == ["Deployment", "RayCluster", "Role", "RoleBinding", "ServiceAccount"]
    for document in documents():
        assert document["apiVersion"]
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", document["metadata"]["name"])


@pytest.mark.parametrize("name", ["head", "gpu", "worker", "flow"])
def test_every_container_has_an_image_its_resources_and_volumes_that_are_there(name: str) -> None:
    pod = pods()[name]
    volumes = {v["name"] for v in pod.get("volumes", ())}
    assert pod["containers"]
    for container in pod["containers"]:
        assert container["image"]
        assert container["resources"]["limits"].keys() >= {"memory"}
        assert {m["name"] for m in container.get("volumeMounts", ())} <= volumes


def test_ray_is_of_the_version_of_the_lock_and_all_its_nodes_have_the_token() -> None:
    spec = of_kind("RayCluster")["spec"]
    assert of_kind("RayCluster")["apiVersion"] == "ray.io/v1"
    assert spec["rayVersion"] == locked("ray")
    for name in ("head", "gpu"):
        (container,) = pods()[name]["containers"]
        assert container["image"] == IMAGE
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        assert container["envFrom"] == [{"secretRef": {"name": "rlhf-flows"}}]
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())
        resources = pods()[group["groupName"]]["containers"][0]["resources"]
        # Kubernetes refuses GPUs whose request is not their limit.
        assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"]
    assert all(isinstance(v, str) for v in spec["headGroupSpec"]["rayStartParams"].values())


def test_the_worker_is_of_the_version_of_the_lock_and_may_do_its_work() -> None:
    deployment, role = of_kind("Deployment"), of_kind("Role")
    (container,) = pods()["worker"]["containers"]
    assert container["image"] == f"prefecthq/prefect:{locked('prefect')}-python3.11-kubernetes"
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    account = of_kind("ServiceAccount")["metadata"]["name"]
    binding = of_kind("RoleBinding")
    assert pods()["worker"]["serviceAccountName"] == account
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    rights = {(r, v) for rule in role["rules"] for r in rule["resources"] for v in rule["verbs"]}
    needed = {("jobs", "create"), ("jobs", "delete"), ("pods", "watch"), ("pods/log", "get")}
    assert rights >= needed


def test_the_template_of_jobs_has_a_variable_for_each_place_and_a_place_for_each_variable() -> None:
    template = json.loads((KUBERNETES / "base-job-template.json").read_text("utf-8"))
    assert template.keys() == {"job_configuration", "variables"}
    variables = template["variables"]
    jsonschema.Draft202012Validator.check_schema(variables)
    named = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert named == variables["properties"].keys()
    defaults = {n: p["default"] for n, p in variables["properties"].items() if "default" in p}
    jsonschema.validate(defaults, variables)
    assert defaults["image"] == IMAGE
    assert defaults["secret"] == of_kind("RayCluster")["metadata"]["name"]
    assert defaults["models_claim"] in json.dumps(pods()["gpu"])
    job = template["job_configuration"]["job_manifest"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert job["spec"]["backoffLimit"] == 0  # whoever starts a run again is Prefect


def instructions() -> list[tuple[str, str]]:
    text = (DOCKER / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_is_installed_by_the_lock_and_runs_as_nobody_special() -> None:
    found = instructions()
    known = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "USER", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in found} <= known
    base = next(rest for word, rest in found if word == "FROM")
    assert re.fullmatch(r"python:3\.11-slim-\w+", base)
    pip = next(rest for word, rest in found if word == "RUN" and "pip install" in rest)
    assert "--constraint locks/linux-x86_64-cpu.txt" in pip
    assert [rest for word, rest in found if word == "USER"][-1] not in ("root", "0")
    apt = next(rest for word, rest in found if word == "RUN" and "apt-get" in rest)
    assert "--no-install-recommends" in apt
    assert "rm -rf /var/lib/apt/lists" in apt
    for word, rest in found:
        if word in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(rest), list)  # a shell between would swallow signals


def test_what_the_image_needs_is_let_through_to_its_build() -> None:
    lines = (DOCKER / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert "*" in lines
    for path in kept:
        assert (ROOT / path).exists(), path
    links = [p.resolve().name for p in (ROOT / "rlhf_flows").iterdir() if p.is_symlink()]
    assert set(kept) >= {*links, "rlhf_flows", "pyproject.toml", "locks"}


def test_the_entrypoint_joins_ray_only_where_a_head_is_named(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    ray = tmp_path / "ray"
    ray.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    ray.chmod(0o755)
    for head, said in (("", None), ("10.0.0.7:6379", "start --address=10.0.0.7:6379 --num-cpus=0")):
        done = subprocess.run(
            ["sh", str(DOCKER / "entrypoint.sh"), sys.executable, "-c", "print('ran')"],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "RLHF_FLOWS_RAY_HEAD": head},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "ran\n"
        assert calls.exists() == (said is not None)
        assert said is None or said in calls.read_text()
