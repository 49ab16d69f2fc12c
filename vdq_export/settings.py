"""Settings that a person wrote (a recipe, the options of a MODEL) and that do not fit their type, in his words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import msgspec

from vdq_export.errors import nearest

_PLACE = re.compile(r" - at `(?:key in )?\$(?P<place>.*)`$")
_STEP = re.compile(r"\.(\w+)|\[(?:\.\.\.|\d+)\]")  # `$.keep_float[0].match`
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_OTHER = re.compile(r"Invalid enum value (.*)")


def explain(error: msgspec.ValidationError, kind: Any) -> tuple[str, str | None]:
    """(what is wrong and where, what to write instead) of `error`, which msgspec.convert(…, kind) raised."""
    text = str(error)
    at = _PLACE.search(text)
    place, said = (at["place"].lstrip("."), text[: at.start()]) if at else ("", text)
    found, place = _at(kind, place), re.sub(r"\[[^]]*\]", "", place)  # in a list: entries of what is extended count too
    if unknown := _UNKNOWN.fullmatch(said):
        keys = [field.encode_name for one in _structs(found) for field in msgspec.structs.fields(one)]
        return f"unknown key {unknown[1]!r}{f' in {place}' if place else ''}", nearest(unknown[1], keys)
    if other := _OTHER.fullmatch(said):
        return f"{place} = {other[1]}", f"one of {', '.join(_words(found))}"
    said = said.replace("Expected `float`", "needs a number").replace("Expected `int`", "needs a whole number")
    return (f"{place}: {said}" if place else said), None


def _at(kind: Any, place: str) -> Any:
    """The type of what is at `place`, a path as msgspec writes them, within a `kind`."""
    for name in _STEP.findall(f".{place}" if place else ""):
        if name:
            fields = [field for one in _structs(kind) for field in msgspec.structs.fields(one)]
            kind = next(field.type for field in fields if field.encode_name == name)
        else:
            kind = next((get_args(one)[0] for one in _parts(kind) if get_origin(one) in (tuple, list)), Any)
    return kind


def _parts(kind: Any) -> Iterator[Any]:
    """`kind`, or what it is a union or an annotation of."""
    yield kind
    if get_origin(kind) is not Literal:
        for one in get_args(kind):
            yield from _parts(one)


def _structs(kind: Any) -> list[Any]:
    return [one for one in _parts(kind) if isinstance(one, type) and issubclass(one, msgspec.Struct)]


def _words(kind: Any) -> list[str]:
    words = [str(word) for one in _parts(kind) if get_origin(one) is Literal for word in get_args(one)]
    return [*words, "a number"] if {int, float} & set(_parts(kind)) else words
