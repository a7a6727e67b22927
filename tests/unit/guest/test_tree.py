"""The guest's root tree."""

from cloudvmm.guest.tree import root_tree


def test_every_folder_comes_before_its_members():
    tree = root_tree(busybox=b"bb", applets=["usr/bin/awk"], modules={"lib/modules/6.1/kernel/a.ko": b""})

    seen: set[str] = set()
    for entry in tree:
        parent = entry.path.rpartition("/")[0]
        assert parent == "" or parent in seen
        seen.add(entry.path)


def test_init_is_executable_and_tables_are_not():
    tree = {entry.path: entry for entry in root_tree(busybox=b"bb", applets=[], modules={})}

    assert tree["init"].mode & 0o777 == 0o755
    assert tree["etc/fstab"].mode & 0o777 == 0o644


def test_applets_lead_to_busybox_but_do_not_replace_it():
    applets = ["bin/cat", "bin/busybox"]
    tree = {entry.path: entry for entry in root_tree(busybox=b"bb", applets=applets, modules={})}

    assert tree["bin/cat"].content == b"/bin/busybox"
    assert tree["bin/busybox"].content == b"bb"
