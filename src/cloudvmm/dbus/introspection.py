"""The object as it describes itself: the XML that `Introspect` gives, of it and of the nodes above it."""

from __future__ import annotations

from typing import Final

from cloudvmm.dbus.method import EVENT, INTERFACE, METHODS, Method

INTROSPECTABLE: Final = "org.freedesktop.DBus.Introspectable"
PEER: Final = "org.freedesktop.DBus.Peer"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"

_DOCTYPE: Final = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)

_STANDARD: Final = f"""\
  <interface name="{INTROSPECTABLE}">
    <method name="Introspect">
      <arg name="xml_data" type="s" direction="out"/>
    </method>
  </interface>
  <interface name="{PEER}">
    <method name="Ping"/>
    <method name="GetMachineId">
      <arg name="machine_uuid" type="s" direction="out"/>
    </method>
  </interface>
  <interface name="{PROPERTIES}">
    <method name="Get">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="property_name" type="s" direction="in"/>
      <arg name="value" type="v" direction="out"/>
    </method>
    <method name="Set">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="property_name" type="s" direction="in"/>
      <arg name="value" type="v" direction="in"/>
    </method>
    <method name="GetAll">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="properties" type="a{{sv}}" direction="out"/>
    </method>
    <signal name="PropertiesChanged">
      <arg name="interface_name" type="s"/>
      <arg name="changed_properties" type="a{{sv}}"/>
      <arg name="invalidated_properties" type="as"/>
    </signal>
  </interface>
"""


def children_of(path: str, object_path: str) -> list[str] | None:
    """Return the names of the nodes below `path` on the way to `object_path`; None for a path beside it."""
    if path == object_path:
        return []
    prefix = path if path == "/" else f"{path}/"
    if not object_path.startswith(prefix):
        return None
    return [object_path[len(prefix) :].partition("/")[0]]


def describe(*, is_object: bool, children: list[str]) -> str:
    """Return the XML of the object itself, or of a node above it."""
    parts = [_DOCTYPE, "<node>\n", _STANDARD]
    if is_object:
        parts += [f'  <interface name="{INTERFACE}">\n', *(_method(method) for method in METHODS.values())]
        parts += [f'    <signal name="{EVENT}">\n', '      <arg name="event" type="s"/>\n']
        parts += ["    </signal>\n", "  </interface>\n"]
    parts += [f'  <node name="{child}"/>\n' for child in children]
    return "".join([*parts, "</node>\n"])


def _method(method: Method) -> str:
    lines = []
    if method.takes:
        lines.append(f'      <arg name="{method.argument}" type="{method.takes}" direction="in"/>\n')
    if method.gives:
        lines.append(f'      <arg type="{method.gives}" direction="out"/>\n')
    if not lines:
        return f'    <method name="{method.name}"/>\n'
    return f'    <method name="{method.name}">\n{"".join(lines)}    </method>\n'
