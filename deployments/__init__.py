"""Recipes and their Prefect deployments: from a configuration to an engine, and no further."""

from rlhf_flows.deployments.recipe import (
    OWN,
    EngineRecipe,
    Recipe,
    RecipeResult,
    find_recipe,
    known_recipes,
    register_recipe,
)

__all__ = [
    "OWN",
    "EngineRecipe",
    "Recipe",
    "RecipeResult",
    "find_recipe",
    "known_recipes",
    "register_recipe",
]
