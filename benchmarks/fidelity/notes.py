"""Why a row fell below the one it adds to ({(table, row label): why}, for all samples or, with the sample's name as a
third key, for one), and why a table is not in its paper's order."""

UNEXPLAINED = "not yet explained"
_TAIL = (
    "the last steps decide: nothing after them corrects their error (W4A4 on digits, mean squared error of the guided "
    "velocity: 1.4 at the last step, 0.08 at the first)"
)
_FEW = (
    "ranges hardly move from step to step here, so bins gain little; and a bin of few steps has seen fewer tokens, so "
    "unseen clips leave its range (probable, not tested)"
)
_COARSE = (
    "smoothing moves range from the input into the weight, and 4-bit weights are the coarser side; alpha is chosen by "
    "the output error of single layers, which the clip follows only roughly (probable, not tested)"
)
_DYNAMIC = (
    "digits lacks the outlier channels that one scale a token cannot separate, and gains the finer steps of a scale a "
    "token; with outliers (digits-hard) the order is the paper's"
)
_SWITCH = (
    f"{_TAIL}, and accumulated change is blind to that: it leaves the last step low or not by chance (with the last "
    "step always high: row of its own)"
)
_PBQ = (
    "on a symmetric grid PBQ's two bounds are one, and the least squared error of a weight is not the least of the "
    "output; the error of the 4-bit input is the larger one anyway"
)
_GPTQ = (
    f"{_TAIL}, and there the rounding of the input does; along the float trajectory GPTQ lowers the error of the first "
    "steps by 4-8 %, raises the last one's by 1 %, and lowers the sum by 4 %"
)
_RANGES = (
    *(
        f"{kind}, {count} {edges}"
        for kind in ("asq", "W8A6 asq")
        for count in (2, 4, 10)
        for edges in ("even", "optimal")
    ),
    *(f"{kind}, {count} ranges" for kind in ("asq", "tsq") for count in (2, 4, 10, 20)),
)

BELOW: dict[tuple[str, ...], str] = {
    ("w4a4", "SVDQuant + GPTQ"): _GPTQ,
    **{("bits", f"static-asq {pair}"): _COARSE for pair in ("4/4", "4/6", "4/8", "4/16", "6/8", "6/6")},
    **{("bits", f"static-tsq-tsw {pair}"): _FEW for pair in ("8/8", "6/8", "8/16", "6/6", "4/6", "4/8")},
    **{("ranges", label): _FEW for label in _RANGES},
    **{("bounds", f"{width} {row}"): _PBQ for width in ("W4A4", "W4A6") for row in ("PBQ", "PBQ + ARQ")},
    **{("switching", f"δ = {delta}"): _SWITCH for delta in ("0.05", "0.1", "0.2", "0.3", "0.5", "1")},
    ("bounds", "W4A6 ARQ"): _SWITCH,
    ("switching", "ITP (high first half), bits of δ = 0.1"): _TAIL,
}
OUT_OF_ORDER = {"bits": _DYNAMIC, "switching": _SWITCH, "bounds": _PBQ, "w4a4": _GPTQ, "methods": _FEW}


def why(table: str, label: str, sample: str) -> str:
    """Why a row is below the one it starts from."""
    return BELOW.get((table, label, sample)) or BELOW.get((table, label)) or UNEXPLAINED


def why_out_of_order(table: str) -> str:
    """Why rows do not stand in the order of the table's paper."""
    return OUT_OF_ORDER.get(table, UNEXPLAINED)
