"""Recipes and their Prefect deployments: from a configuration to an engine, and no further."""

from rlhf_flows.deployments.recipe import RECIPES, Recipe, RecipeResult, find_recipe

__all__ = ["RECIPES", "Recipe", "RecipeResult", "find_recipe"]
