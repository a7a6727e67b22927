"""JSON Schemas of what goes over the wire, made from the types that decode and encode it.

Two forms. What a client sends: optional members may be absent or null, unknown ones are ignored. What it is
told: members that are not set are left out, all others are there. Imported only where somebody asks for the
API's document, since that costs more than serving a VM does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, get_args

import msgspec

from cloudvmm.config import form
from cloudvmm.config.device import FsConfig, TpmConfig
from cloudvmm.config.meaning import meaning_of
from cloudvmm.config.net import NetConfig
from cloudvmm.config.platform import PlatformConfig
from cloudvmm.config.vm import VmConfig

Schema = dict[str, Any]

REF: Final = "#/components/schemas/"
TOLD: Final = "Told"
"""What the name of a schema ends in where it is told otherwise than it is sent."""

_U64_MAX: Final = 2**64 - 1
_REF_TEMPLATE: Final = REF + "{name}"
_MAC: Final = {"pattern": "^[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}$"}
_IP: Final = {"anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]}
_OLD_TEXT: Final = {"type": ["string", "null"], "deprecated": True}

# What decoding asks of a member beyond its type.
_FORMS: Final[dict[tuple[type, str], Schema]] = {
    (NetConfig, "mac"): _MAC,
    (NetConfig, "host_mac"): _MAC,
    (NetConfig, "ip"): _IP,
    (NetConfig, "mask"): _IP,
}
# Members of 2022, read in place of today's: config/legacy.py.
_OLD_MEMBERS: Final[dict[type, dict[str, Schema]]] = {
    VmConfig: {
        "kernel": {"deprecated": True, "description": 'Form of 2022: `{"path": ...}`'},
        "initramfs": {"deprecated": True, "description": 'Form of 2022: `{"path": ...}`'},
        "cmdline": {"deprecated": True, "description": 'Form of 2022: `{"args": ...}`'},
        "tdx": {"deprecated": True, "description": 'Form of 2022: `{"firmware": ...}`'},
    },
    PlatformConfig: {
        "serial_number": _OLD_TEXT | {"description": "Old name of `system_serial_number`"},
        "uuid": _OLD_TEXT | {"description": "Old name of `system_uuid`"},
    },
}


def _given(member: str) -> Schema:
    return {"required": [member], "properties": {member: {"type": "string"}}}


# What decoding asks of members together. An old name and its successor are not both taken.
_TOGETHER: Final[dict[type, list[Schema]]] = {
    PlatformConfig: [
        {"not": {"required": ["serial_number", "system_serial_number"]}},
        {"not": {"required": ["uuid", "system_uuid"]}},
    ],
    FsConfig: [{"anyOf": [_given("socket"), _given("shared_dir")]}],
    TpmConfig: [{"anyOf": [_given("socket"), _given("state_dir")]}],
}


def sent_schemas(kinds: Iterable[type]) -> dict[str, Schema]:
    """Return the schemas of `kinds` and all that they hold, as a client sends them."""
    structs = _structs_of(kinds)
    schemas = _plain_schemas(structs)
    for name, kind in structs.items():
        _complete(schemas[name], kind)
    return schemas


def told_schemas(kinds: Iterable[type], *, sent: Iterable[str]) -> dict[str, Schema]:
    """Return the schemas of `kinds` and all that they hold, as a client is told them.

    A struct that is in `sent` too is called by another name, which ends in `TOLD`.
    """
    structs = _structs_of(kinds)
    names = {name: name + TOLD for name in structs if name in set(sent)}
    schemas = {}
    for name, schema in _plain_schemas(structs).items():
        if name in structs:
            _complete(schema, structs[name])
            _keep_what_is_told(schema, structs[name])
            _rename_refs(schema, names)
        schemas[names.get(name, name)] = schema
    return schemas


def struct_fields(kind: type[msgspec.Struct]) -> list[msgspec.structs.FieldInfo]:
    return list(msgspec.structs.fields(kind))


def default_of(field: msgspec.structs.FieldInfo) -> Any:
    """Return the default as JSON has it; `msgspec.NODEFAULT` where there is none."""
    if field.default is msgspec.UNSET:
        return msgspec.NODEFAULT
    if field.default_factory is not msgspec.NODEFAULT:
        value = field.default_factory()
        return msgspec.json.decode(form.encode(value)) if isinstance(value, msgspec.Struct) else value
    return field.default if field.required else msgspec.to_builtins(field.default)


def first_paragraph(text: str | None) -> str:
    """Return the first paragraph of a docstring as one line."""
    return " ".join((text or "").strip().partition("\n\n")[0].split())


def _structs_of(kinds: Iterable[type]) -> dict[str, type[msgspec.Struct]]:
    found: dict[str, type[msgspec.Struct]] = {}
    waiting: list[Any] = list(kinds)
    while waiting:
        kind = waiting.pop()
        if not isinstance(kind, type) or get_args(kind):
            waiting.extend(get_args(kind))
        elif issubclass(kind, msgspec.Struct) and kind.__name__ not in found:
            found[kind.__name__] = kind
            waiting.extend(field.type for field in struct_fields(kind))
    return found


def _plain_schemas(structs: dict[str, type[msgspec.Struct]]) -> dict[str, Schema]:
    with form.first_use:
        _, schemas = msgspec.json.schema_components(structs.values(), ref_template=_REF_TEMPLATE)
    for name, schema in schemas.items():
        _bound(schema)
        schema.pop("description", None)
        if name in structs and (text := first_paragraph(structs[name].__doc__)):
            schema["description"] = text
    return dict(schemas)


def _bound(schema: Any) -> None:
    """Write down the upper end of 64 bits, which msgspec cannot hold."""
    if isinstance(schema, list):
        for item in schema:
            _bound(item)
    elif isinstance(schema, dict):
        if schema.get("type") == "integer":
            schema.setdefault("maximum", _U64_MAX)
        for item in schema.values():
            _bound(item)


def _complete(schema: Schema, kind: type[msgspec.Struct]) -> None:
    for field in struct_fields(kind):
        member = schema["properties"][field.encode_name]
        default = default_of(field)
        if default is not msgspec.NODEFAULT:
            member["default"] = default
        _add_form(member, _FORMS.get((kind, field.name)))
        if phrase := _phrase(kind, field.name):
            member["description"] = phrase
    schema["properties"].update(_OLD_MEMBERS.get(kind, {}))
    if kind in _TOGETHER:
        schema["allOf"] = _TOGETHER[kind]


def _add_form(member: Schema, wanted: Schema | None) -> None:
    if wanted is not None:
        text = next(one for one in member["anyOf"] if one.get("type") == "string")
        text.update(wanted)


def _phrase(kind: type[msgspec.Struct], member: str) -> str | None:
    try:
        return meaning_of(kind, member)
    except KeyError:
        return None


def _keep_what_is_told(schema: Schema, kind: type[msgspec.Struct]) -> None:
    for old in _OLD_MEMBERS.get(kind, {}):
        del schema["properties"][old]
    schema.pop("allOf", None)
    required = []
    for field in struct_fields(kind):
        member = schema["properties"][field.encode_name]
        member.pop("default", None)
        if _is_always_told(field, kind):
            required.append(field.encode_name)
        elif "anyOf" in member:
            _drop_null(member)
    schema["required"] = required


def _is_always_told(field: msgspec.structs.FieldInfo, kind: type[msgspec.Struct]) -> bool:
    if kind in form.PRINTED_WITH_NULLS:
        return True
    return field.default is not None and not form.is_left_out_when_false(kind, field.name)


def _drop_null(member: Schema) -> None:
    left = [one for one in member["anyOf"] if one != {"type": "null"}]
    if len(left) == 1:
        del member["anyOf"]
        member.update(left[0])
    else:
        member["anyOf"] = left


def _rename_refs(schema: Any, names: dict[str, str]) -> None:
    if isinstance(schema, list):
        for item in schema:
            _rename_refs(item, names)
    elif isinstance(schema, dict):
        name = str(schema.get("$ref", "")).removeprefix(REF)
        if name in names:
            schema["$ref"] = REF + names[name]
        for item in schema.values():
            _rename_refs(item, names)
