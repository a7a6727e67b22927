"""Which node a path is, for objects anywhere in the tree."""

import pytest

from cloudvmm.dbus.introspection import children_of, describe


@pytest.mark.parametrize(
    ("path", "object_path", "children"),
    [
        ("/", "/", []),
        ("/", "/org", ["org"]),
        ("/", "/org/x/Y", ["org"]),
        ("/org", "/org/x/Y", ["x"]),
        ("/org/x", "/org/x/Y", ["Y"]),
        ("/org/x/Y", "/org/x/Y", []),
        ("/org/x/Y/z", "/org/x/Y", None),
        ("/or", "/org/x/Y", None),
        ("/other", "/org", None),
        ("/a", "/", None),
    ],
)
def test_nodes_lead_from_the_root_to_the_object(path, object_path, children):
    assert children_of(path, object_path) == children


def test_only_the_object_itself_shows_the_api():
    assert "org.cloudhypervisor.DBusApi1" in describe(is_object=True, children=[])
    node = describe(is_object=False, children=["x"])
    assert "org.cloudhypervisor.DBusApi1" not in node
    assert '<node name="x"/>' in node
