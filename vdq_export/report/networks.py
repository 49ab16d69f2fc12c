"""Which set of weights a plan belongs to, by the name that the reports call it."""

from __future__ import annotations

from collections.abc import Iterable

from vdq_export.plan import QuantPlan


def network_name(plan: QuantPlan, plans: Iterable[QuantPlan]) -> str:
    """ "", or the expert, or, where bins have weights of their own, that bin: "bin03", "low.bin03".

    plans: all of the bundle, or all of the plan's expert. Precisions of the same weights have one name.
    """
    sets = [one for one in plans if one.expert == plan.expert and one.precision in ("", "low")]
    if len(sets) <= 1:
        return plan.expert
    first = plan.bins[0]
    mine = next(one for one in sets if (one.bins[0].t, one.bins[0].branch) == (first.t, first.branch))
    return ".".join(filter(None, (plan.expert, mine.bins[0].name)))
