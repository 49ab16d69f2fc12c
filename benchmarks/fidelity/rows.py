"""The tables as data: their rows, what each row should not fall below, and the order its paper found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One way of quantizing.

    recipe: a name; settings: what is changed of it, as the tables of a recipe file, lists replaced. tsw, optimal:
    timestep bins (None: the recipe's) and how their edges are chosen. policy: what the runtime is told to do from step
    to step; in it `{share}` is the share of high-precision steps that the row `share_of` had, `{seed}` the seed. peer:
    a name of peers.PEERS instead of a recipe. base: label of the row this one adds a method to: below it, the table
    must say why. many: the judge sees more clips.
    """

    label: str
    recipe: str = ""
    settings: Settings = field(default_factory=dict)
    target: str = "ort-int8"
    tsw: int | str | None = None
    optimal: bool = False
    policy: str = ""
    share_of: str = ""
    peer: str = ""
    base: str = ""
    many: bool = False


@dataclass(frozen=True)
class Table:
    """order: labels from worst to best as the paper has them, one chain or several; each step is checked. note: what a
    reader has to know."""

    name: str
    title: str
    rows: tuple[Row, ...]
    source: str = ""
    order: tuple[tuple[str, ...], ...] = ()
    note: str = ""


STEPS = "all"  # one range a denoising step: 20 of the samples' schedule


def merged(base: Settings, over: Settings) -> dict[str, Any]:
    """`over` wins; tables merge key by key."""
    both = dict(base)
    for key, value in over.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


def bits(weights: int, activations: int) -> dict[str, Any]:
    return {"weights": {"bits": weights}, "activations": {"bits": activations}}


def target_of(activations: int) -> str:
    """onnxruntime's integer kernels where it has them; else the exact reference."""
    return "ort-int8" if activations == 8 else "reference"


METHODS = (
    Row("static-minmax", "static-minmax", tsw=1),
    Row("static-tsw", "static-tsw", tsw=STEPS, base="static-minmax"),
    Row("static-asq", "static-asq", tsw=1, base="static-minmax", many=True),
    Row("static-tsq-tsw", "static-tsq-tsw", tsw=STEPS, base="static-asq"),
    Row("per-token dynamic", "static-minmax", {"activations": {"granularity": "token"}}, "reference", tsw=1),
)
PAIRS = ((8, 8), (6, 8), (4, 8), (8, 16), (4, 16), (6, 6), (4, 6), (4, 4))  # weights / activations


def _pairs() -> tuple[Row, ...]:
    made = []
    for w, a in PAIRS:
        for row in METHODS:
            if row.label != "static-tsw":
                dynamic = row.target == "reference"
                base = f"{row.base} {w}/{a}" if row.base else ""
                tsw = 4 if row.tsw == STEPS else row.tsw
                made.append(
                    Row(f"{row.label} {w}/{a}", row.recipe, merged(row.settings, bits(w, a)),
                        "reference" if dynamic else target_of(a), tsw, base=base)
                )  # fmt: skip
    return tuple(made)


def _ranges() -> tuple[Row, ...]:
    made = [Row("asq, 1 range", "static-asq", tsw=1)]
    before = "asq, 1 range"
    for count in (2, 4, 10):
        even, optimal = f"asq, {count} even", f"asq, {count} optimal"
        made.append(Row(even, "static-asq", tsw=count, base=before))
        made.append(Row(optimal, "static-asq", tsw=count, optimal=True, base=even))
        before = even
    made.append(Row("asq, 20 ranges", "static-asq", tsw=STEPS, base=before))
    before = "asq, 1 range"
    for count in (2, 4, 10, STEPS):
        label = f"tsq, {20 if count == STEPS else count} ranges"
        made.append(Row(label, "static-tsq-tsw", tsw=count, base=before))
        before = label
    for count in (2, 4, 10):
        even, optimal = f"W8A6 asq, {count} even", f"W8A6 asq, {count} optimal"
        made.append(Row(even, "static-asq", bits(8, 6), "reference", count))
        made.append(Row(optimal, "static-asq", bits(8, 6), "reference", count, optimal=True, base=even))
    return tuple(made)


_NEAREST = {"weights": {"rounding": "nearest"}, "activations": {"clip": []}}
_RETAINED = [
    {"match": "*.to_out.0", "weights": 8, "activations": 8, "why": "attention outputs are the most sensitive modules"},
    {"match": "*.ffn.net.2", "weights": 8, "activations": 8, "why": "with the feed-forward outputs"},
]


def _ladder() -> tuple[Row, ...]:
    """Each row is the last one with one method more, bins and weight groups alike."""

    def row(label: str, base: str, settings: Settings, many: bool = False) -> Row:
        return Row(label, "wan22-w4a4", settings, "reference", base=base, many=many)

    return (
        Row("static-minmax W4A4", "static-minmax", bits(4, 4), "reference", many=True),
        row("RTN", "", {**_NEAREST, "smoothing": {"kind": "none"}, "low_rank": {"rank": 0}}),
        row("SVDQuant + RTN", "RTN", _NEAREST),
        row("SVDQuant + GPTQ", "SVDQuant + RTN", {"activations": {"clip": []}}),
        row("+ TS-clip", "SVDQuant + GPTQ", {}, many=True),
        row("+ TS-clip + ARQ", "+ TS-clip", {"rotation": {"kind": "hadamard", "scale": "channel"}}, many=True),
        row("+ module retention", "+ TS-clip", {"override": _RETAINED}, many=True),
        Row("static-w4a4", "static-w4a4", target="reference", many=True),
        Row("MXFP4", "wan22-mxfp4", target="reference"),
    )


_PLAIN = {"weights": {"range": "minmax"}, "rotation": {"kind": "none"}}
_PBQ = {"rotation": {"kind": "none"}}
_ARQ = {"weights": {"range": "minmax"}}


def _bounds() -> tuple[Row, ...]:
    made = []
    for width, recipe in (("W4A4", "dvd-w4a4"), ("W4A6", "dvd-w4a6")):
        plain, both = f"{width} min-max", f"{width} PBQ + ARQ"
        made.append(Row(plain, recipe, _PLAIN, "reference"))
        made.append(Row(f"{width} PBQ", recipe, _PBQ, "reference", base=plain))
        made.append(Row(f"{width} ARQ", recipe, _ARQ, "reference", base=plain))
        made.append(Row(both, recipe, target="reference", base=plain))
    return tuple(made)


GBS = "δ = 0.1"
DELTAS = ("0.05", "0.1", "0.2", "0.3", "0.5", "1")
PATTERNS = {"STP": "low first half", "ITP": "high first half", "ABS": "alternating", "SBA": "random"}


def _switching() -> tuple[Row, ...]:
    """All of one bundle, which can reuse steps; the policy says whether it does."""

    def row(label: str, policy: str, cache: float = 0, **more: Any) -> Row:
        reuse = {"schedule": {"cache": 0.1}}
        return Row(label, "dvd-w4a6", reuse, "reference", policy=f"{policy}+cache={cache:g}", **more)

    low = "low bits only (δ = ∞)"
    spent = dict.fromkeys(PATTERNS, "share={share}") | {"SBA": "share={share},seed={seed}"}
    return (
        row(low, "delta=inf"),
        *(row(f"δ = {delta}", f"delta={delta}", base=low) for delta in reversed(DELTAS)),
        row("high bits only (δ = 0)", "delta=0", base=low),
        *(
            row(f"{name} ({what}), bits of {GBS}", f"pattern={name.lower()},{spent[name]}", share_of=GBS, base=low)
            for name, what in PATTERNS.items()
        ),
        row(f"{GBS}, last step high", f"delta={GBS[4:]},end=high", base=low),
        *(row(f"{GBS}, reuse {cache:g}", f"delta={GBS[4:]}", cache) for cache in (0.05, 0.1, 0.2)),
        *(row(f"high bits only, reuse {cache:g}", "delta=0", cache) for cache in (0.05, 0.1, 0.2)),
    )


PEERS = (
    Row("vdq-export, static-asq", "static-asq", many=True),
    Row("quantize_static, as documented", peer="quantize_static"),
    Row("quantize_static, same layers", peer="quantize_static same"),
    Row("quantize_static, same layers, percentile", peer="quantize_static percentile"),
    Row("NNCF, as documented", peer="nncf"),
    Row("NNCF, same layers", peer="nncf same"),
    Row("Model Optimizer INT8", peer="modelopt int8"),
    Row("Model Optimizer INT8 SmoothQuant, α = 1", peer="modelopt smoothquant"),
    Row("Model Optimizer INT8 SmoothQuant, α = 0.5", peer="modelopt smoothquant 0.5"),
)

_INTEGER = ("static-minmax", "static-tsw", "static-asq", "static-tsq-tsw", "smoothquant")
_SLOW = (
    "quarot", "vidit-q", "q-dit", "arq-static", "rtn", "svdquant", "svdquant-gptq", "wan22-w4a4", "wan22-mxfp4",
    "dvd-w4a4", "dvd-w4a6", "dvd-w4a8", "static-w4a4",
)  # fmt: skip
SHIPPED = dict.fromkeys(_INTEGER, "ort-int8") | dict.fromkeys(_SLOW, "reference")

TABLES = (
    Table(
        "methods", "Static methods at W8A8", METHODS, "Hardware-friendly static quantization, Table I",
        (("static-minmax", "static-tsw", "static-tsq-tsw"), ("static-minmax", "static-asq")),
    ),
    Table(
        "bits", "Bit widths, weights / activations (tsq-tsw with 4 ranges)", _pairs(),
        "Hardware-friendly static quantization, Table III",
        tuple((f"per-token dynamic {w}/{a}", f"{name} {w}/{a}")
              for w, a in PAIRS for name in ("static-asq", "static-tsq-tsw")),
    ),
    Table("ranges", "Timestep ranges", _ranges(), "Hardware-friendly static quantization, Table IV"),
    Table(
        "w4a4", "Low-rank branch, GPTQ, clipping, retention at W4A4", _ladder(),
        "Timestep-aware SVDQuant-GPTQ, Table I",
        (("RTN", "SVDQuant + RTN", "SVDQuant + GPTQ", "+ TS-clip", "+ module retention"),),
    ),
    Table(
        "bounds", "PBQ and ARQ", _bounds(), "DVD-Quant, Table 3",
        tuple((f"{width} min-max", f"{width} {one}", f"{width} PBQ + ARQ")
              for width in ("W4A4", "W4A6") for one in ("PBQ", "ARQ")),
    ),
    Table(
        "switching", "Bit switching and step reuse", _switching(), "DVD-Quant, Table 2",
        tuple((f"{name} ({what}), bits of {GBS}", GBS) for name, what in PATTERNS.items()),
    ),
    Table(
        "peers", "Other quantizers, W8A8", PEERS,
        note="All get the calls of the same calibration clips; quantize_static and NNCF torch.onnx.export's default "
        "graph, Model Optimizer the torch module. \"Same layers\": attention's matrix products and the layers that our "
        "recipes leave in float are left in float; Model Optimizer always so. NNCF (its transformer settings) decides "
        "itself which other operators it quantizes, and runs in OpenVINO. Model Optimizer's ONNX path wants CuPy and "
        "onnxruntime-gpu, so its torch path is measured, in simulated integers on the CPU.",
    ),
    Table("recipes", "Every recipe", tuple(Row(name, name, target=where) for name, where in SHIPPED.items())),
)  # fmt: skip
