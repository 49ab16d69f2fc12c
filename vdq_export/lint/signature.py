"""Operand types of an operator as text: "u16, const s8/c, s32? -> u16".

u8 s16 f32 i64 bool   the type an operand is quantized to, or its own; u8|u16 for either, * for any
/c  /b                with a scale per channel, or per block; without: one scale
const  var            only values stored in the file; only computed values; neither: both
?                     may be omitted
...                   more of the operand before, any number
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from vdq_export.errors import VdqError
from vdq_export.lint.view import Operand, Unit

_WHICH = {"const": True, "var": False}


@dataclass(frozen=True)
class Slot:
    """What one operand may be."""

    codes: frozenset[str]
    constant: bool | None = None
    optional: bool = False

    def takes(self, operand: Operand) -> bool:
        code = operand.code
        if code == "none":
            return self.optional
        return (self.constant is None or self.constant == operand.constant) and bool(self.codes & {code, "*"})


@dataclass(frozen=True)
class Side:
    """The inputs or the outputs; `more`: the last slot repeats."""

    slots: tuple[Slot, ...]
    more: bool

    def takes(self, operands: Sequence[Operand]) -> bool:
        slots = list(self.slots)
        if self.more and slots:
            slots += [slots[-1]] * (len(operands) - len(slots))
        if len(operands) > len(slots) or any(not slot.optional for slot in slots[len(operands) :]):
            return False
        return all(slot.takes(operand) for slot, operand in zip(slots, operands, strict=False))


@dataclass(frozen=True)
class Signature:
    inputs: Side
    outputs: Side

    def takes(self, unit: Unit) -> bool:
        return self.inputs.takes(unit.inputs) and self.outputs.takes(unit.outputs)


@cache
def parse(text: str) -> Signature:
    """Raises VdqError for text that is no signature."""
    inputs, arrow, outputs = text.partition("->")
    if not arrow:
        raise VdqError(f"{text!r} is no signature", hint='write "u16, const s8/c -> u16"')
    return Signature(_side(inputs, text), _side(outputs, text))


def _side(text: str, whole: str) -> Side:
    words = [word.strip() for word in text.split(",") if word.strip()]
    more = bool(words) and words[-1] == "..."
    return Side(tuple(_slot(word, whole) for word in (words[:-1] if more else words)), more)


def _slot(word: str, whole: str) -> Slot:
    *which, codes = word.split()
    if len(which) > 1 or any(one not in _WHICH for one in which):
        raise VdqError(f"{word!r} in {whole!r} is no operand", hint="an operand is `u16`, `const s8/c`, `var u8|u16`")
    known = frozenset(codes.removesuffix("?").split("|"))
    return Slot(known, _WHICH[which[0]] if which else None, codes.endswith("?"))


def describe(unit: Unit) -> str:
    """The types a unit has, in the same language."""
    inputs = ", ".join(f"const {o.code}" if o.constant else o.code for o in unit.inputs)
    return f"{inputs} -> {', '.join(o.code for o in unit.outputs)}"
