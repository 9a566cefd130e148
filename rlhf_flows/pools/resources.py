"""What modules ask for against what there is. Without Ray, so that it can be asked before."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_flows.errors import ResourcesError

__all__ = ["check_fits", "num_gpus_here"]

_FIELDS = {"CPU": "num_cpu", "GPU": "num_gpu", "memory": "memory_bytes"}


def check_fits(
    resource: str, asks: Sequence[tuple[str, float]], *, have: float, where: str
) -> None:
    """Refuses what can never be placed.

    Args:
        resource: `CPU`, `GPU` or `memory` (bytes).
        asks: (module, amount) of every module.

    Raises:
        ResourcesError: names the resource, who asks for it, and what there is.
    """
    total = sum(amount for _, amount in asks)
    if total <= have:
        return
    who = ", ".join(f"{name} {_amount(resource, n)}" for name, n in asks if n)
    raise ResourcesError(
        f"the modules ask for {_amount(resource, total)} ({who}), {where} has"
        f" {_amount(resource, have)}: lower models.<name>.{_FIELDS[resource]} or num_replica, or"
        " use a larger cluster (cluster.address)"
    )


def num_gpus_here() -> int:
    """GPUs of this machine that workers may see."""
    import torch  # for those alone who ask for a GPU

    return torch.cuda.device_count()


def _amount(resource: str, value: float) -> str:
    if resource == "memory":
        return f"{value / 2**30:.1f} GiB of memory"
    return f"{value:g} {resource}s"
