"""Recipes: which method, with which settings, as TOML. Frozen and strict: an unknown key is an error.

A recipe says how numbers are chosen, never what they are; `calib` turns recipe + record into a QuantPlan.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from vdq_export.errors import RecipeError, UnknownNameError
from vdq_export.settings import explain

LAST = "<last>"  # in keep_float: the layers behind which there is no other, by the graph
Alpha = Annotated[float, Meta(ge=0.0, le=1.0)]


class _Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


Bits = Literal[4, 6, 8, 16]
AttentionKind = Literal["int8 scores", "fp8 values"]
NumberFormat = Literal["int", "mxfp4", "mxfp8", "nvfp4", "fp8"]


class GptqRecipe(_Settings, frozen=True):
    """GPTQ: `damping` is a share of the Hessian's mean diagonal, raised when Cholesky fails; `block` columns at a time;
    act_order: channels with the largest Hessian diagonal first."""

    damping: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.01
    block: Annotated[int, Meta(gt=0)] = 128
    act_order: bool = False


class WeightRecipe(_Settings, frozen=True):
    """Weights: symmetric, one scale per output channel, or per `group` input channels of one.

    range: `mse` narrows each range to the least squared error, `pbq` narrows both bounds by progressive search.
    rounding: `nearest`, or `gptq` with the Hessian of the quantized input. grid: `mxfp4` and `mxfp8` are E2M1 and
    E4M3 numbers with E8M0 scales over blocks of 32, `nvfp4` E2M1 with E4M3 scales over blocks of 16, `fp8` E4M3 with a
    float scale per output channel. learned: what becomes of scales that training left in the checkpoint; used, they
    replace smoothing, rotation, low-rank branches and the search of ranges.
    """

    bits: Bits = 8
    grid: NumberFormat = "int"
    group: Literal[0, 32, 64, 128] = 0
    range: Literal["minmax", "mse", "pbq"] = "minmax"
    rounding: Literal["nearest", "gptq"] = "nearest"
    learned: Literal["use", "ignore"] = "use"
    gptq: GptqRecipe = GptqRecipe()


class ActivationRecipe(_Settings, frozen=True):
    """Activations: asymmetric, one scale and zero_point per tensor and bin. `percentile` is two-sided, in percent.

    clip: shares of the range tried per value and bin on the output error of the layers that read it; () tries none.
    granularity: `token` and `channel` are computed at run time, only for targets whose table says so; so are the
    block scales of `mxfp4`, `mxfp8` and `nvfp4`. grid: `fp8` is E4M3, symmetric; `float` quantizes weights alone.
    between: bits of the operators between the linears, on targets that leave none in float; 0: `bits`.
    """

    bits: Bits = 8
    between: Literal[0, 8, 16] = 0
    grid: NumberFormat | Literal["float"] = "int"
    granularity: Literal["tensor", "token", "channel"] = "tensor"
    range: Literal["minmax", "percentile", "mse"] = "minmax"
    percentile: Annotated[float, Meta(gt=50.0, le=100.0)] = 99.99
    clip: tuple[Annotated[float, Meta(gt=0.0, le=1.0)], ...] = ()
    per_branch: bool = False  # True: conditional and unconditional calls get bins of their own


class SmoothingRecipe(_Settings, frozen=True):
    """Channel smoothing X/s · sW. `asq`: one s for all timesteps from a running mean; `absmax`: from the largest
    magnitude seen; `tsq`: one s a bin, each bin with its own weights, or with `shared` one vector and a scalar a bin.

    `alpha` is the migration strength; "search" tries 0.1 … 1.0 by 0.1 per layer or, with `scope = "global"`, once.
    """

    kind: Literal["none", "asq", "absmax", "tsq"] = "none"
    alpha: Alpha | Literal["search"] = 0.5
    scope: Literal["layer", "global"] = "layer"
    momentum: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.95
    shared: bool = False


class RotationRecipe(_Settings, frozen=True):
    """Hadamard rotation of what matching layers read. block: its size, 0 the largest that fits the width.

    scale: `channel` divides by a fixed per-channel scale after the rotation (ARQ with static scales). search: leave a
    value as it is where rotating it does not lower the output error; false rotates every one.
    """

    kind: Literal["none", "hadamard"] = "none"
    block: Annotated[int, Meta(ge=0)] = 0
    match: tuple[str, ...] = ("*",)
    scale: Literal["none", "channel"] = "none"
    search: bool = True


class LowRankRecipe(_Settings, frozen=True):
    """A float branch of `rank` beside each quantized weight (0: none), from the SVD of the smoothed, rotated weight.

    budget: instead of one rank for all, ranks by error, together at most this share of the float weights' size.
    """

    rank: Annotated[int, Meta(ge=0)] = 0
    budget: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    match: tuple[str, ...] = ("*",)


class Override(_Settings, frozen=True):
    """Other bits for the layers that `match` (a shell pattern over module paths); 0 leaves the recipe's.

    group: input channels a weight scale; rank: of the low-rank branch; -1 leaves the recipe's.
    """

    match: str
    why: str
    weights: Literal[0, 4, 6, 8, 16] = 0
    activations: Literal[0, 4, 6, 8, 16] = 0
    group: Literal[-1, 0, 32, 64, 128] = -1
    rank: Annotated[int, Meta(ge=-1)] = -1


class AllocateRecipe(_Settings, frozen=True):
    """Bits per layer, solved under a budget: `size` mean bits a weight, or `bops` mean weight bits × activation bits.

    high_blocks: at most so many transformer blocks above the lowest bits; -1 for any number.
    """

    size: Annotated[float, Meta(ge=0.0)] = 0.0
    bops: Annotated[float, Meta(ge=0.0)] = 0.0
    weights: tuple[Bits, ...] = (4, 6, 8)
    activations: tuple[Bits, ...] = ()  # (): the recipe's own
    high_blocks: int = -1


class ScheduleRecipe(_Settings, frozen=True):
    """What the host does from step to step (docs/schedule.md).

    delta: accumulated relative change of the output at which a step runs in `high` activation bits; without it all
    steps run alike. end: `high` for the last step whatever delta says. cache: accumulated change of the network's
    modulated input at which a step is computed again instead of reusing the last one's output; 0 never reuses but
    carries what that needs, none leaves it out.
    """

    delta: Annotated[float, Meta(ge=0.0)] | None = None
    high: Bits = 8
    end: Literal["low", "high"] = "low"
    cache: Annotated[float, Meta(ge=0.0)] | None = None


class AttentionRecipe(_Settings, frozen=True):
    """Attention operands: symmetric, static, one scale a head and bin. scores: q and k of q·kᵀ; values: V of P·V."""

    scores: Literal["float", "int8"] = "float"
    values: Literal["float", "fp8"] = "float"

    @property
    def kinds(self) -> tuple[AttentionKind, ...]:
        """What a target must have."""
        asked: dict[AttentionKind, bool] = {"int8 scores": self.scores == "int8", "fp8 values": self.values == "fp8"}
        return tuple(kind for kind, is_asked in asked.items() if is_asked)


class Keep(_Settings, frozen=True):
    """Layers left in float: `match` is a shell pattern over module paths, or LAST; `why` goes into plan and report.

    bins: numbers of the bins in whose graphs they are; () leaves them out of quantization altogether. In some bins
    only, a layer keeps its smoothing, rotation and everything else that was chosen for it.
    """

    match: str
    why: str
    bins: tuple[Annotated[int, Meta(ge=0)], ...] = ()


class VerifyRecipe(_Settings, frozen=True):
    """Thresholds of `verify`; one that is missed makes it fail, naming layer and bin."""

    min_psnr_db: float = 30.0
    min_layer_sqnr_db: float = 12.0
    min_integer_coverage: Annotated[float, Meta(ge=0.0, le=1.0)] = 1.0
    max_float_error: float = 1e-4
    max_judge_drop: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.1


class Recipe(_Settings, frozen=True):
    """One named way of quantizing; `name`, `summary` and `source` are for people.

    tsw: timestep bins where the caller names none: how many, or their edges as shares of the steps; with experts, of
    each.
    """

    name: str
    summary: str
    source: str = ""
    tsw: Annotated[int, Meta(ge=1)] | Literal["auto", "all"] | tuple[float, ...] = 4
    format: Literal[1] = 1
    weights: WeightRecipe = WeightRecipe()
    activations: ActivationRecipe = ActivationRecipe()
    smoothing: SmoothingRecipe = SmoothingRecipe()
    rotation: RotationRecipe = RotationRecipe()
    low_rank: LowRankRecipe = LowRankRecipe()
    allocate: AllocateRecipe = AllocateRecipe()
    attention: AttentionRecipe = AttentionRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    keep_float: tuple[Keep, ...] = ()
    override: tuple[Override, ...] = ()
    expert: dict[str, dict[str, Any]] = {}  # expert's name -> what it has otherwise than the rest of the recipe
    verify: VerifyRecipe = VerifyRecipe()

    @property
    def kept_everywhere(self) -> tuple[Keep, ...]:
        """The rules of `keep_float` that hold in every bin."""
        return tuple(rule for rule in self.keep_float if not rule.bins)

    @property
    def needs_data(self) -> bool:
        """Whether calibration must run the network. False: weights alone say all, or scales come at run time."""
        return bool(self.data_uses)

    @property
    def data_uses(self) -> tuple[str, ...]:
        """What in the recipe looks at activations, in words; () for one that needs no data."""
        activations, rotation = self.activations, self.rotation
        searched = rotation.search or rotation.scale != "none"
        at_run_time = activations.granularity != "tensor" and activations.grid == "int"
        free = activations.grid in ("float", "mxfp4", "mxfp8") or at_run_time
        uses = {
            "static activation ranges": not free,
            "activation clip ratios": bool(activations.clip),
            "attention scales": bool(self.attention.kinds),
            "smoothing": self.smoothing.kind != "none",
            "rotations chosen by output error": rotation.kind != "none" and searched,
            "GPTQ": self.weights.rounding == "gptq",
            "bits allocated by sensitivity": bool(self.allocate.size or self.allocate.bops),
            "a schedule that follows the output": self.schedule.delta is not None or self.schedule.cache is not None,
        }
        return tuple(use for use, is_used in uses.items() if is_used)

    def of_expert(self, name: str) -> Recipe:
        """The recipe one expert gets. Raises RecipeError when its table holds an unknown key."""
        settings = msgspec.json.decode(msgspec.json.encode(msgspec.structs.replace(self, expert={})))
        return _convert(_merge(settings, self.expert.get(name, {})), f"{self.name}, expert {name or '(only one)'}")


def names() -> list[str]:
    """Names of the recipes that ship with the package, sorted."""
    files = resources.files("vdq_export").joinpath("recipes").iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def load(name_or_path: str | Path) -> Recipe:
    """The recipe with that name, or in that TOML file, with `extends` resolved.

    Raises UnknownNameError for a name nobody knows, RecipeError for a file that is no recipe.
    """
    return _convert(_resolve(str(name_or_path), seen=()), str(name_or_path))


def parse(text: str, origin: str = "recipe") -> Recipe:
    """The recipe that `text` is, with `extends` resolved. Raises RecipeError, UnknownNameError."""
    try:
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{origin}: {error}") from error
    return _convert(_extended(settings, origin, ()), origin)


def _convert(settings: dict[str, Any], origin: str) -> Recipe:
    try:
        recipe = msgspec.convert(settings, Recipe)
    except msgspec.ValidationError as error:
        what, instead = explain(error, Recipe)
        raise RecipeError(f"recipe {origin}: {what}", hint=instead or "see docs/recipes.md for the keys") from error
    for expert in recipe.expert:
        recipe.of_expert(expert)  # raises for what its table has wrong, before hours of work
    return recipe


def _resolve(origin: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if origin in seen:
        raise RecipeError(f"recipe {origin} extends itself: {' -> '.join((*seen, origin))}")
    return _extended(_read(origin), origin, seen)


def _extended(settings: dict[str, Any], origin: str, seen: tuple[str, ...]) -> dict[str, Any]:
    """`settings`, of `origin`, on top of what they extend."""
    parent = settings.pop("extends", None)
    if parent is None:
        return settings
    if not isinstance(parent, str):
        raise RecipeError(f"recipe {origin}: extends must be a name or a path, got {parent!r}")
    if parent.endswith(".toml") and not Path(parent).is_absolute():
        parent = str(Path(origin).parent / parent)
    return _merge(_resolve(parent, (*seen, origin)), settings)


def _read(origin: str) -> dict[str, Any]:
    path = Path(origin)
    is_file = path.suffix == ".toml"
    if not is_file and origin not in names():
        if path.exists():
            raise RecipeError(f"{origin} is no recipe", hint="a recipe is a file whose name ends in .toml")
        raise UnknownNameError("recipe", origin, names())
    if is_file and not path.is_file():
        hint = "without .toml it is the recipe that ships" if path.stem in names() else "see `vdq-export recipes`"
        raise RecipeError(f"recipe {origin}: no such file", hint=hint)
    source = path if is_file else resources.files("vdq_export").joinpath("recipes", f"{origin}.toml")
    own = {"name": path.stem} if is_file else {}  # not that of what it extends: it says something else
    try:
        return own | tomllib.loads(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"recipe {origin}: {error}") from error


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins; tables merge key by key, lists of tables are appended to the base's."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merge(old, value)
        elif isinstance(old, list) and isinstance(value, list) and all(isinstance(one, dict) for one in old + value):
            merged[key] = [*old, *value]
        else:
            merged[key] = value
    return merged
