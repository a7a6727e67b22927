"""QEMU ids: safe, distinct, and readable back."""

from __future__ import annotations

import re

from hypothesis import example, given
from hypothesis import strategies as st

from cloudvmm.engine.qemu.name import device_id, node_name, qdev_id

QEMU_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
ANY_ID = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@given(ANY_ID)
@example("_disk0")
@example("a.b/ä\0")
@example("")
def test_qdev_id_is_well_formed_and_reads_back(text):
    name = qdev_id(text)
    assert QEMU_ID.fullmatch(name)
    assert device_id(name) == text


@given(ANY_ID)
@example("x" * 31)
@example("x" * 30)
def test_node_name_is_well_formed_and_fits(text):
    name = node_name(text)
    assert QEMU_ID.fullmatch(name)
    assert len(name) <= 31


@given(ANY_ID, ANY_ID)
def test_node_names_of_different_disks_differ(first, second):
    assert (node_name(first) == node_name(second)) == (first == second)


@given(st.text())
@example("d.4")
@example("d.zz")
@example("d.ff")
@example("d.61")
@example("piix3")
@example("d_disk0/virtio-backend")
def test_device_id_of_a_name_that_is_not_ours_is_none(name):
    found = device_id(name)
    assert found is None or qdev_id(found) == name
