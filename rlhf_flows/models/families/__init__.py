"""Families of models: which architectures can be trained here, and what is peculiar to each.

One file a family where it takes more than names; a program adds its own by `register_family`, and
`check_family` tells whether what it promised is true. docs/families.md is the guide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_flows.models.families.family import (
    Family,
    FamilyCarrier,
    conversion_of,
    family_of,
    known_families,
    register_family,
    registered_families,
)

if TYPE_CHECKING:
    from rlhf_flows.models.families.check import FamilyReport, check_family

__all__ = [
    "Family",
    "FamilyCarrier",
    "FamilyReport",
    "check_family",
    "conversion_of",
    "family_of",
    "known_families",
    "register_family",
    "registered_families",
]


def __getattr__(name: str) -> Any:
    if name not in ("FamilyReport", "check_family"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rlhf_flows.models.families import check  # loads transformers

    return getattr(check, name)
