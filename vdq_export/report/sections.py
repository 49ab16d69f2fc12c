"""The tables of the report page, as rows of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from vdq_export import recipe_toml
from vdq_export.metrics import db_text
from vdq_export.plan import ConstantPlan, Conversion, QuantPlan, ValuePlan
from vdq_export.recipe import Recipe
from vdq_export.report.content import Content
from vdq_export.report.costs import FOR_PEOPLE
from vdq_export.report.networks import network_name
from vdq_export.report.passes import PassRun

SHOWN = 200  # edits of a pass; all of them are in passes.json
EXTREMES = 5  # values shown of those with the narrowest and the widest ranges
FIRST = ("smoothing", "rotation")  # what somebody who looks at the passes wants to know


@dataclass(frozen=True)
class Pass:
    """One pass; networks: whose graphs it did the same to. more, more_skipped: that are not shown."""

    name: str
    networks: tuple[str, ...]
    applied: int
    details: tuple[str, ...]
    more: int
    skipped: tuple[tuple[str, str], ...]
    more_skipped: int

    @property
    def first(self) -> bool:
        """Whether people should see it without asking."""
        return bool(self.skipped) or self.name in FIRST

    @property
    def skipped_count(self) -> int:
        return len(self.skipped) + self.more_skipped


@dataclass(frozen=True)
class Values:
    """What is quantized beside the linears: how many of which kind, and (value, bin, type, range) of the extremes."""

    counts: tuple[str, ...]
    narrowest: tuple[tuple[str, str, str, str], ...]
    widest: tuple[tuple[str, str, str, str], ...]


def key_figures(content: Content) -> list[tuple[str, str]]:
    """What somebody who decides asks first, beside the verdict."""
    plans = [plan for plan in content.bundle.plans if plan.precision in ("", "low")]
    networks = {plan.expert: plan for plan in reversed(plans)}  # bins with weights of their own hold the same layers
    layers = [layer for plan in networks.values() for layer in plan.layers]
    quantized = sum(layer.quantized for layer in layers)
    whole = float_bytes(content)
    products = sorted({giga(one): one for one in calls(content)}.items(), key=lambda item: item[1])
    return [
        ("bundle on disk", megabytes(content.bundle.size)),
        ("of it a device loads", megabytes(loaded_bytes(content))),
        ("float weights", megabytes(whole) if whole else "unknown"),
        ("clips, PSNR", db_text(content.verify.psnr_db if content.verify else None)),
        ("bins", str(len(content.bundle.schedule.bins))),
        ("layers quantized", f"{quantized} of {len(layers)}"),
        ("multiply-adds a call", " … ".join(dict.fromkeys((products[0][0], products[-1][0]))) if products else "0"),
    ]


def calls(content: Content) -> list[int]:
    """Multiply-adds of one call of the network in each bin: its own graph, and what runs ahead of it at every step."""
    ahead = {index: one.multiply_adds for one in content.graphs if one.what == "mixed" for index in one.bins}
    return [one.multiply_adds + ahead.get(i, 0) for one in content.graphs if one.what == "bin" for i in one.bins]


def loaded_bytes(content: Content) -> int:
    """Of the graphs, weights, tables and compiled contexts: what is for people or another toolchain stays behind."""
    return sum(count for name, count in content.storage.parts if name not in FOR_PEOPLE)


def float_bytes(content: Content) -> int:
    """Of the float weights of all experts; bins with weights of their own have the same ones. 0 where unknown."""
    plans = content.bundle.plans
    experts = {network_name(plan, plans): plan.expert for plan in plans}
    found: dict[str, int] = {}
    for one in content.hoisting.networks if content.hoisting else ():
        expert = experts.get(one.name, one.name)
        found[expert] = max(found.get(expert, 0), one.whole.weight_bytes)
    return sum(found.values())


def hoisted(content: Content) -> list[str]:
    """A line for each set of weights; sets of which the same is true share theirs."""
    lines: dict[str, list[str]] = {}
    networks = content.hoisting.networks if content.hoisting else ()
    for one in networks:
        lines.setdefault(msgspec.structs.replace(one, name="").in_words(), []).append(one.name)
    first = {one.name: one for one in reversed(networks)}
    return [msgspec.structs.replace(first[names[0]], name=", ".join(names)).in_words() for names in lines.values()]


def float_graphs(content: Content) -> list[tuple[str, str]]:
    """(expert, hash) of each float graph that was quantized."""
    return list(dict.fromkeys((plan.expert, plan.graph_hash) for plan in content.bundle.plans))


def calibration(content: Content) -> list[str]:
    """How often each network was run to be calibrated, and at how many timesteps."""
    seen: dict[str, tuple[int, set[float]]] = {}
    for one in content.ranges.networks if content.ranges else ():
        expert = "" if one.name.startswith("bin") else one.name.partition(".bin")[0]
        seen[expert] = one.calls, seen.get(expert, (0, set[float]()))[1] | set(one.t)
    return [
        f"{f'{expert}: ' if expert else ''}{calls} calls of the network, timesteps: {len(timesteps)}"
        for expert, (calls, timesteps) in seen.items()
        if calls
    ]


def recipe_text(content: Content) -> str:
    """The recipe with what was asked of it: the bins there are, and every threshold."""
    recipe = content.bundle.manifest.recipe or content.bundle.plans[0].recipe
    return recipe_toml.dump(_with_bins(recipe, content.bundle.plans), whole=("tsw", "verify"))


def _with_bins(recipe: Recipe, plans: Sequence[QuantPlan]) -> Recipe:
    """The number of bins that every expert got, in place of the recipe's; as it is where they differ in it."""
    counts = Counter(
        plan.expert
        for plan in plans
        for one in plan.bins
        if plan.precision in ("", "low") and one.branch in ("any", "cond")
    )
    same = set(counts.values())
    return msgspec.structs.replace(recipe, tsw=same.pop()) if len(same) == 1 else recipe


def passes(content: Content) -> list[Pass]:
    """The passes that did or skipped something: what was skipped first, then smoothing and rotation, then in order.

    Runs with the same result stand together.
    """
    alike: dict[bytes, list[PassRun]] = {}
    for one in content.passes.passes if content.passes else ():
        if one.applied or one.skipped:
            alike.setdefault(msgspec.json.encode(msgspec.structs.replace(one, network="")), []).append(one)
    found = []
    for runs in alike.values():
        one = runs[0]
        found.append(
            Pass(
                name=one.name,
                networks=tuple(run.network for run in runs if run.network),
                applied=one.applied,
                details=one.details[:SHOWN],
                more=max(0, len(one.details) - SHOWN),
                skipped=tuple((skip.where, skip.why) for skip in one.skipped[:SHOWN]),
                more_skipped=max(0, len(one.skipped) - SHOWN),
            )
        )
    return sorted(found, key=lambda one: (not one.skipped, not one.first))


def in_float(content: Content) -> list[tuple[str, list[str]]]:
    """(reason, layers) of those that were not quantized, the most frequent reason first."""
    plans = content.bundle.plans
    names = {id(plan): network_name(plan, plans) for plan in plans}
    everywhere = {plan.expert: {names[id(one)] for one in plans if one.expert == plan.expert} for plan in plans}
    reasons: dict[str, dict[tuple[str, str], set[str]]] = {}
    for plan in plans:
        told = [(layer.keep_float, layer.name) for layer in plan.layers]
        told += [
            (why, f"{layer.name} in {one.name}")
            for layer in plan.layers
            for one, why in zip(plan.bins, layer.float_in, strict=False)
        ]
        told += [(attention.keep_float, attention.name) for attention in plan.attentions]
        for why, name in told:
            if why:
                reasons.setdefault(why, {}).setdefault((plan.expert, name), set()).add(names[id(plan)])

    def labels(expert: str, name: str, networks: set[str]) -> list[str]:
        if networks == everywhere[expert]:
            return [": ".join(filter(None, (expert, name)))]
        return [f"{network}: {name}" for network in sorted(networks)]

    found = [
        (why, [x for (e, n), ones in layers.items() for x in labels(e, n, ones)]) for why, layers in reasons.items()
    ]
    return sorted(found, key=lambda item: -len(item[1]))


def other_values(content: Content) -> Values | None:
    """What is quantized beside the linears: of attentions, or every value on targets that quantize every operator."""
    counts = Counter[str]()
    ranges: list[tuple[float, float, tuple[str, str, str, str]]] = []
    for plan in content.bundle.plans:
        counts.update(_kinds(plan))
        for value in plan.values:
            for one, found in zip(plan.bins, value.ranges, strict=True):
                text = f"{found.lo:.4g} … {found.hi:.4g}, scale {found.scale:.4g}"
                ranges.append((found.hi - found.lo, found.scale, (value.name, one.name, value.dtype, text)))
    if not counts:
        return None
    ordered = [row for _, _, row in sorted(ranges)]
    counted = tuple(f"{count} {kind}" for kind, count in counts.items())
    narrowest, widest = _of_each_value(ordered), _of_each_value(reversed(ordered))
    return Values(counted, narrowest, widest)


def _kinds(plan: QuantPlan) -> Iterable[str]:
    """What each thing that has a quantizer is, in words."""
    told: list[tuple[str, Iterable[ValuePlan | Conversion | ConstantPlan]]] = [
        ("values", plan.values),
        ("second quantizers of a value", [one for value in plan.values for one in value.conversions]),
        ("constants", plan.constants),
    ]
    found = [f"{what}, {one.dtype}" for what, ones in told for one in ones]
    operands = [(letter, one) for attention in plan.attentions for letter, one in attention.operands.items()]
    return found + [f"attention operands {letter}, {one.dtype} a head" for letter, one in operands]


def _of_each_value(rows: Iterable[tuple[str, str, str, str]]) -> tuple[tuple[str, str, str, str], ...]:
    """The first rows of as many values as are shown."""
    first: dict[str, tuple[str, str, str, str]] = {}
    for row in rows:
        first.setdefault(row[0], row)
        if len(first) == EXTREMES:
            break
    return tuple(first.values())


def floating(content: Content) -> tuple[str, ...]:
    """The planned integer linears that run in float, by bin."""
    return content.verify.integer_kernels.floating if content.verify else ()


def megabytes(count: float) -> str:
    """1.23 MB, 45.6 kB …"""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1000
    return ""


def giga(count: float) -> str:
    """Of operations: 381 M, 1.2 G …"""
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:g}"
