"""As much of msgspec as an export and its bundle need, in plain Python: for machines that nothing can be installed on.

A machine with a GPU may offer torch, triton, onnx and onnxruntime alone. `install()` stands in for msgspec where it is
missing, for this benchmark only. Values are converted as in strict msgspec; constraints of Meta are not checked, since
nothing comes from outside here.
"""

from __future__ import annotations

import inspect
import json as _json
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

_MISSING: Any = object()


class MsgspecError(Exception):
    pass


class EncodeError(MsgspecError):
    pass


class DecodeError(MsgspecError):
    pass


class ValidationError(DecodeError):
    pass


class Meta:
    def __init__(self, **constraints: Any) -> None:
        self.constraints = constraints


class _Field:
    def __init__(self, default: Any = _MISSING, default_factory: Any = _MISSING, name: str | None = None) -> None:
        self.default, self.default_factory, self.name = default, default_factory, name


def field(*, default: Any = _MISSING, default_factory: Any = _MISSING, name: str | None = None) -> Any:
    return _Field(default, default_factory, name)


class _Config:
    def __init__(self, settings: Mapping[str, Any], owner: type) -> None:
        self.frozen = bool(settings.get("frozen"))
        self.forbid_unknown_fields = bool(settings.get("forbid_unknown_fields"))
        self.kw_only = bool(settings.get("kw_only"))
        tag = settings.get("tag")
        self.tag_field = settings.get("tag_field") or ("type" if tag is not None else None)
        self.tag = owner.__name__ if tag is True else tag
        if self.tag_field and self.tag is None:
            self.tag = owner.__name__


class Struct:
    """A record with the fields of its annotations and of those of its bases."""

    __struct_config__: typing.ClassVar[_Config]
    __struct_settings__: typing.ClassVar[dict[str, Any]] = {}
    __struct_defaults__: typing.ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__()
        inherited = {} if "tag" in settings else {k: v for k, v in cls.__struct_settings__.items() if k != "tag"}
        cls.__struct_settings__ = {**cls.__struct_settings__, **inherited, **settings}
        cls.__struct_config__ = _Config(cls.__struct_settings__, cls)
        names = [name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)]
        own = {name: cls.__dict__.get(name, _MISSING) for name in names}
        cls.__struct_defaults__ = {**cls.__struct_defaults__, **own}
        for name in own:
            if name in cls.__dict__:
                delattr(cls, name)

    def __init__(self, *values: Any, **named: Any) -> None:
        defaults = type(self).__struct_defaults__
        given = dict(zip(defaults, values, strict=False)) | named
        if unknown := given.keys() - defaults.keys():
            raise TypeError(f"{type(self).__name__}: unexpected {sorted(unknown)}")
        for name, default in defaults.items():
            object.__setattr__(self, name, given[name] if name in given else _default(self, name, default))
        after: Callable[[], None] | None = getattr(self, "__post_init__", None)
        if after is not None:
            after()

    def __setattr__(self, name: str, value: Any) -> None:
        if type(self).__struct_config__.frozen:
            raise AttributeError(f"immutable type: '{type(self).__name__}'")
        object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and _values(self) == _values(other)

    def __hash__(self) -> int:
        return hash((type(self), tuple(_values(self).values())))

    def __repr__(self) -> str:
        told = ", ".join(f"{name}={value!r}" for name, value in _values(self).items())
        return f"{type(self).__name__}({told})"


def _default(struct: Struct, name: str, default: Any) -> Any:
    if isinstance(default, _Field):
        default = default.default_factory() if default.default_factory is not _MISSING else default.default
    if default is _MISSING:
        raise TypeError(f"{type(struct).__name__}: missing {name}")
    return type(default)(default) if isinstance(default, list | dict | set) else default


def _values(struct: Struct) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in type(struct).__struct_defaults__}


@cache
def _fields(kind: type[Struct]) -> dict[str, tuple[str, Any]]:
    """Encoded name -> (attribute, type)."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {}
    for name, default in kind.__struct_defaults__.items():
        written = default.name if isinstance(default, _Field) and default.name else name
        found[written] = (name, hints[name])
    return found


def to_builtins(value: Any, *, enc_hook: Callable[[Any], Any] | None = None) -> Any:
    if isinstance(value, Struct):
        config = type(value).__struct_config__
        told = {config.tag_field: config.tag} if config.tag_field else {}
        fields = _fields(type(value))
        return told | {name: to_builtins(getattr(value, one), enc_hook=enc_hook) for name, (one, _) in fields.items()}
    if isinstance(value, Mapping):
        return {key: to_builtins(one, enc_hook=enc_hook) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_builtins(one, enc_hook=enc_hook) for one in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if enc_hook is None:
        raise TypeError(f"{type(value).__name__} cannot be encoded")
    return to_builtins(enc_hook(value), enc_hook=enc_hook)


def convert(value: Any, type: Any, *, strict: bool = True) -> Any:
    """`value` as a `type`. Raises ValidationError."""
    return _convert(value, type, strict)


def _convert(value: Any, kind: Any, strict: bool) -> Any:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.Annotated:
        return _convert(value, inside[0], strict)
    if origin is typing.Literal:
        return _checked(value, any(value == one and isinstance(value, type(one)) for one in inside), kind)
    if origin in (typing.Union, types.UnionType):
        return _union(value, inside, strict)
    if origin in (tuple, list, dict) or kind in (tuple, list, dict):
        return _container(value, origin or kind, inside, strict)
    if isinstance(kind, type) and issubclass(kind, Struct):
        return _struct(value, kind, strict)
    return _scalar(value, kind, strict)


def _checked(value: Any, right: bool, kind: Any) -> Any:
    if not right:
        raise ValidationError(f"Expected `{kind}`, got `{value!r}`")
    return value


def _scalar(value: Any, kind: Any, strict: bool) -> Any:
    if kind in (None, type(None)):
        return _checked(value, value is None, kind)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not strict and isinstance(value, str) and kind in (int, float):
        return kind(value)
    return _checked(value, isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool)), kind)


def _container(value: Any, kind: Any, inside: tuple[Any, ...], strict: bool) -> Any:
    if kind is dict:
        _checked(value, isinstance(value, Mapping), kind)
        key, one = inside or (Any, Any)
        return {_convert(k, key, False): _convert(v, one, strict) for k, v in value.items()}  # JSON's keys are text
    _checked(value, isinstance(value, list | tuple), kind)
    if kind is list:
        return [_convert(one, inside[0] if inside else Any, strict) for one in value]
    if len(inside) == 2 and inside[1] is ...:
        return tuple(_convert(one, inside[0], strict) for one in value)
    _checked(value, not inside or len(inside) == len(value), kind)
    return tuple(_convert(one, kind, strict) for one, kind in zip(value, inside, strict=True))


def _union(value: Any, kinds: tuple[Any, ...], strict: bool) -> Any:
    for kind in kinds:
        config = getattr(kind, "__struct_config__", None)
        if config is not None and config.tag_field and isinstance(value, Mapping):
            if value.get(config.tag_field) == config.tag:
                return _struct(value, kind, strict)
            continue
        try:
            return _convert(value, kind, strict)
        except ValidationError:
            continue
    raise ValidationError(f"Expected `{kinds}`, got `{value!r}`")


def _struct(value: Any, kind: type[Struct], strict: bool) -> Any:
    if isinstance(value, kind):
        return value
    _checked(value, isinstance(value, Mapping), kind)
    fields, config = _fields(kind), kind.__struct_config__
    unknown = value.keys() - fields.keys() - {config.tag_field}
    if unknown and config.forbid_unknown_fields:
        raise ValidationError(f"Object contains unknown field `{min(unknown)}`")
    given = {one: _convert(value[name], hint, strict) for name, (one, hint) in fields.items() if name in value}
    try:
        return kind(**given)
    except TypeError as error:
        raise ValidationError(str(error)) from error


class json:
    """The module msgspec.json."""

    @staticmethod
    def encode(value: Any, *, enc_hook: Callable[[Any], Any] | None = None, order: str | None = None) -> bytes:
        plain = to_builtins(value, enc_hook=enc_hook)
        text = _json.dumps(plain, separators=(",", ":"), ensure_ascii=False, sort_keys=order == "sorted")
        return text.encode()

    @staticmethod
    def decode(data: bytes | str, *, type: Any = Any) -> Any:
        try:
            return convert(_json.loads(data), type)
        except ValueError as error:
            raise DecodeError(str(error)) from error

    @staticmethod
    def format(data: bytes, *, indent: int = 2) -> bytes:
        return _json.dumps(_json.loads(data), indent=indent, ensure_ascii=False).encode()


class structs:
    """The module msgspec.structs."""

    @staticmethod
    def replace(struct: Any, **changes: Any) -> Any:
        return type(struct)(**{**_values(struct), **changes})


def install() -> bool:
    """Be `msgspec` unless it is there. True where this stands in."""
    if find_spec("msgspec") is not None:
        return False
    stand_in()
    return True


def stand_in() -> None:
    """Be `msgspec` from here on."""
    me: Any = sys.modules[__name__]
    for name, owner in (("msgspec", me), ("msgspec.json", json), ("msgspec.structs", structs)):
        module: Any = types.ModuleType(name)
        module.__dict__.update(
            {key: value for key, value in vars(owner).items() if key == "__init_subclass__" or key[:2] != "__"}
        )
        for key, value in vars(owner).items():
            if isinstance(value, staticmethod):
                module.__dict__[key] = value.__func__
        sys.modules[name] = module
    sys.modules["msgspec"].json = sys.modules["msgspec.json"]  # type: ignore[attr-defined]
    sys.modules["msgspec"].structs = sys.modules["msgspec.structs"]  # type: ignore[attr-defined]


def install_psutil() -> bool:
    """Be `psutil` unless it is there: how much memory is free is all that is asked of it on the way. True if so."""
    if find_spec("psutil") is not None:
        return False
    module: Any = types.ModuleType("psutil")
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    module.virtual_memory = lambda: types.SimpleNamespace(total=total, available=free)
    sys.modules["psutil"] = module
    return True
