"""Why a row fell below the one it adds to, or out of its paper's order: {(table, row label): why}, for all samples or,
with the sample's name as a third key, for one."""

UNEXPLAINED = "not yet explained"
WHY: dict[tuple[str, ...], str] = {}


def why(table: str, label: str, sample: str) -> str:
    return WHY.get((table, label, sample)) or WHY.get((table, label)) or UNEXPLAINED
