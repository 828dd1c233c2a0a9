"""A strict reader of protobuf's JSON: an unknown key or a value of the wrong type is an error that names it."""

import base64
import binascii
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import betterproto

_INTEGERS = {
    betterproto.TYPE_INT32, betterproto.TYPE_INT64, betterproto.TYPE_UINT32, betterproto.TYPE_UINT64, betterproto.TYPE_SINT32,
    betterproto.TYPE_SINT64, betterproto.TYPE_FIXED32, betterproto.TYPE_FIXED64, betterproto.TYPE_SFIXED32, betterproto.TYPE_SFIXED64,
}  # fmt: skip
_FLOATS = {betterproto.TYPE_FLOAT, betterproto.TYPE_DOUBLE}
_DURATION = re.compile(r"-?\d+(\.\d{1,9})?s")


def parse(cls: type[betterproto.Message], text: str) -> betterproto.Message:
    """Parse a message. Keys are in camel case or snake case.

    Raises:
        ValueError: the text is not JSON, or not of this message type.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        cut_off = error.pos >= len(text.rstrip())
        raise ValueError("unexpected EOF" if cut_off else f"syntax error: {error}") from error
    return _message(cls, value, cls.__name__)


def to_dict(message: betterproto.Message) -> dict[str, Any]:
    """The message with camel case keys, without unset fields. 64-bit numbers are strings, as in protojson."""
    values: dict[str, Any] = message.to_dict(casing=betterproto.Casing.CAMEL)  # type: ignore[arg-type]
    return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    """Convert floats that are whole numbers to int, at any depth."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def camel_keys(cls: type[betterproto.Message], value: Any) -> Any:
    """A message's JSON with camel case keys. Its values, including the keys of maps, do not change."""
    if not isinstance(value, dict):
        return value
    message = cls()
    known = {name.rstrip("_"): name for name in message._betterproto.meta_by_field_name}
    known.update({_camel(short): name for short, name in list(known.items())})
    return {_camel(key): _camel_value(message, known.get(key), part) for key, part in value.items()}


def _camel_value(message: betterproto.Message, name: str | None, value: Any) -> Any:
    if name is None or message._betterproto.meta_by_field_name[name].proto_type != betterproto.TYPE_MESSAGE:
        return value
    cls = message._betterproto.cls_by_field[name]
    if not issubclass(cls, betterproto.Message):
        return value
    return [camel_keys(cls, part) for part in value] if isinstance(value, list) else camel_keys(cls, value)


def _message(cls: type[betterproto.Message], value: Any, where: str) -> betterproto.Message:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: an object is needed, not {_kind(value)}")
    message = cls()
    known = {name.rstrip("_"): name for name in message._betterproto.meta_by_field_name}
    known.update({_camel(short): name for short, name in list(known.items())})
    for key, part in value.items():
        name = known.get(key)
        if name is None:
            raise ValueError(f'{where}: unknown field "{key}"')
        if part is not None:
            setattr(message, name, _field(message, name, part, f"{where}.{key}"))
    return message


def _field(message: betterproto.Message, name: str, value: Any, where: str) -> Any:
    info = message._betterproto
    meta = info.meta_by_field_name[name]
    cls = info.cls_by_field[name]
    if meta.proto_type == betterproto.TYPE_MAP:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: an object is needed, not {_kind(value)}")
        assert meta.map_types is not None
        return {str(key): _scalar(meta.map_types[1], cls, part, f"{where}.{key}") for key, part in value.items()}
    if isinstance(info.default_gen[name](), list):
        if not isinstance(value, list):
            raise ValueError(f"{where}: an array is needed, not {_kind(value)}")
        return [_one(meta, cls, part, f"{where}[{number}]") for number, part in enumerate(value)]
    return _one(meta, cls, value, where)


def _one(meta: betterproto.FieldMetadata, cls: Any, value: Any, where: str) -> Any:
    if meta.wraps:
        return _scalar(meta.wraps, cls, value, where)
    if meta.proto_type != betterproto.TYPE_MESSAGE:
        return _scalar(meta.proto_type, cls, value, where)
    if cls is timedelta:
        if not isinstance(value, str) or not _DURATION.fullmatch(value):
            raise ValueError(f'{where}: a duration like "30s" is needed, not {value!r}')
        return timedelta(seconds=float(value[:-1]))
    if cls is datetime:
        try:
            when = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{where}: a time in RFC 3339 is needed, not {value!r}") from error
        return when if when.tzinfo else when.replace(tzinfo=UTC)
    return _message(cls, value, where)


def _scalar(proto_type: str, cls: Any, value: Any, where: str) -> Any:
    if proto_type == betterproto.TYPE_STRING and isinstance(value, str):
        return value
    if proto_type == betterproto.TYPE_BOOL and isinstance(value, bool):
        return value
    if proto_type in _INTEGERS and not isinstance(value, bool):
        try:
            if int(value) == float(value):
                return int(value)
        except (ValueError, TypeError):
            pass
    if proto_type in _FLOATS and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if proto_type == betterproto.TYPE_ENUM:
        names = {member.name: member for member in cls}
        if value in names:
            return names[value]
    if proto_type == betterproto.TYPE_BYTES and isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error:
            pass
    raise ValueError(f"{where}: a value of type {proto_type} is needed, not {_kind(value)}")


def _kind(value: Any) -> str:
    return {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}.get(
        type(value), "null"
    )


def _camel(name: str) -> str:
    head, *tail = name.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in tail)
