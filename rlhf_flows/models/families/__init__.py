"""Families of models: which architectures can be trained here, and what is peculiar to each.

One file a family where it takes more than names; a program adds its own by `register_family`.
Whether what a family promises is true, `rlhf_flows.models.family_check` tells. docs/families.md is
the guide.
"""

from __future__ import annotations

from rlhf_flows.models.families.family import (
    Family,
    FamilyCarrier,
    conversion_of,
    family_of,
    known_families,
    register_family,
    registered_families,
)

__all__ = [
    "Family",
    "FamilyCarrier",
    "conversion_of",
    "family_of",
    "known_families",
    "register_family",
    "registered_families",
]
