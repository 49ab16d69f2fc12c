"""Layers that a recipe keeps in float in some bins only.

All numbers are chosen as if they were quantized everywhere, so that such a rule changes nothing else: what was measured
with a layer put back to float is what an export with the rule gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from msgspec.structs import replace

from vdq_export.errors import RecipeError
from vdq_export.plan import LayerPlan, QuantPlan
from vdq_export.recipe import Keep


def mark(plan: QuantPlan) -> QuantPlan:
    """`plan` with its layers told in which bins they are in float; of several rules the first that matches counts."""
    rules = [rule for rule in plan.recipe.keep_float if rule.bins]
    return replace(plan, layers=tuple(_marked(layer, plan, rules) for layer in plan.layers)) if rules else plan


def check(plans: Iterable[QuantPlan]) -> None:
    """Raise RecipeError for a rule that names a bin which none of the plans has."""
    plans = list(plans)
    bins = sorted(one.index for plan in plans for one in plan.bins)
    for rule in (rule for plan in plans for rule in plan.recipe.keep_float):
        if unknown := sorted(set(rule.bins) - set(bins)):
            raise RecipeError(
                f"recipe {plans[0].recipe.name} keeps {rule.match} in float in bin {unknown[0]}, which there is not",
                hint=f"the bins are 0 to {bins[-1]}",
            )


def _marked(layer: LayerPlan, plan: QuantPlan, rules: Iterable[Keep]) -> LayerPlan:
    if not layer.quantized or layer.hoisted:  # hoisted: in no bin's graph
        return layer
    mine = [rule for rule in rules if fnmatchcase(layer.name, rule.match)]
    whys = [next((rule for rule in mine if one.index in rule.bins), None) for one in plan.bins]
    if not any(whys):
        return layer
    return replace(layer, float_in=tuple(f"{rule.why} (recipe: {rule.match})" if rule else "" for rule in whys))
