"""How every JSON file of a bundle is written and read: indented, one form for the same data, no NaN, strict types."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from vdq_export.errors import BundleError, VdqError

T = TypeVar("T", bound=msgspec.Struct)


def encode(data: msgspec.Struct, origin: str) -> bytes:
    """JSON that ends in a newline; dictionaries are sorted, numpy and torch scalars become numbers.

    What was written is read back: raises BundleError for data that its own type would refuse (NaN, Inf, objects).
    """
    try:
        text = msgspec.json.encode(data, order="deterministic", enc_hook=_number)
        msgspec.json.decode(text, type=type(data))
    except (TypeError, msgspec.ValidationError, msgspec.EncodeError) as error:
        raise BundleError(f"{origin} cannot be written: {error}") from error
    return msgspec.json.format(text, indent=1) + b"\n"


def decode(data: bytes, kind: type[T], origin: str, error: type[VdqError]) -> T:
    """`data` as a `kind`; raises `error`, naming `origin`, for what is no JSON or does not fit the type."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError) as cause:
        raise error(f"{origin}: {cause}") from cause


def _number(value: Any) -> Any:
    if callable(getattr(value, "tolist", None)):  # numpy and torch scalars, arrays of settings
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no place in JSON")
