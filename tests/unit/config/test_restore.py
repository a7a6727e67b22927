"""What a restore must replace in the saved configuration."""

import itertools
import re

import pytest

from cloudvmm.config import restore as rules
from cloudvmm.config.device import DeviceConfig, VfioFdRequiresIommufdFd
from cloudvmm.config.error import IdentifierNotUnique, ValidationError
from cloudvmm.config.net import NetConfig
from cloudvmm.config.operation import (
    MemoryRestoreMode,
    MemoryZoneUpdate,
    RestoreConfig,
    RestoredNetConfig,
    RestoredVfioConfig,
)
from cloudvmm.config.platform import IommufdFdRequiresIommufd, PlatformConfig
from cloudvmm.config.restore import check_restore
from cloudvmm.config.vm import VmConfig

NET_WITH_FDS = VmConfig(net=[NetConfig(id="net0", fds=[-1, -1])])
WITH_IOMMUFD = VmConfig(
    devices=[DeviceConfig(id="gpu", path="/p")], platform=PlatformConfig(iommufd=True, iommufd_fd=-1)
)
SAVED_WITH_FD = VmConfig(
    devices=[DeviceConfig(id="gpu", fd=-1)], platform=PlatformConfig(iommufd=True, iommufd_fd=-1)
)


def restore(**members):
    return RestoreConfig(source_url="file:///s", **members)


def zone(zone_id):
    return MemoryZoneUpdate(id=zone_id, host_numa_node=0)


RULES = [
    (
        restore(memory_restore_mode=MemoryRestoreMode.ON_DEMAND, prefault=True),
        VmConfig(),
        rules.InvalidRestorePrefaultWithOnDemand,
        "'prefault' cannot be combined with 'memory_restore_mode=ondemand'",
    ),
    (
        restore(net_fds=[RestoredNetConfig(id="net0", num_fds=2)] * 2),
        NET_WITH_FDS,
        IdentifierNotUnique,
        "Identifier net0 is not unique",
    ),
    (
        restore(net_fds=[RestoredNetConfig(id="net0", num_fds=1)]),
        NET_WITH_FDS,
        rules.RestoreNetFdCountMismatch,
        "Number of Net FDs passed for 'net0' during Restore: 1. Expected: 2",
    ),
    (
        restore(),
        NET_WITH_FDS,
        rules.RestoreMissingRequiredNetId,
        "Net id net0 is associated with FDs and is required",
    ),
    (
        restore(zone_updates=[zone("a"), zone("a")]),
        VmConfig(),
        rules.MultipleMemoryZoneUpdates,
        "Multiple updates for the same zone defined",
    ),
    (
        restore(zone_updates=[zone("")]),
        VmConfig(),
        rules.MemoryZoneUpdatesEmptyId,
        "At least one memory zone update with an empty ID was defined",
    ),
    (
        restore(vfio_fds=[RestoredVfioConfig(id="gpu")]),
        WITH_IOMMUFD,
        VfioFdRequiresIommufdFd,
        "VFIO device `fd=` requires platform `iommufd_fd=<fd>`",
    ),
    (
        restore(vfio_fds=[RestoredVfioConfig(id="gpu")], iommufd_fd=9),
        VmConfig(),
        IommufdFdRequiresIommufd,
        "Platform `iommufd_fd=<fd>` requires `iommufd=on`",
    ),
    (
        restore(vfio_fds=[RestoredVfioConfig(id="gpu")] * 2, iommufd_fd=9),
        WITH_IOMMUFD,
        IdentifierNotUnique,
        "Identifier gpu is not unique",
    ),
    (
        restore(vfio_fds=[RestoredVfioConfig(id="nic")], iommufd_fd=9),
        WITH_IOMMUFD,
        rules.RestoreUnknownVfioId,
        "VFIO device id 'nic' in 'vfio_fds' does not match any device in the snapshot",
    ),
    (
        restore(),
        SAVED_WITH_FD,
        rules.RestoreMissingVfioFd,
        "VFIO device 'gpu' was FD backed and needs a new fd in 'vfio_fds'",
    ),
]


@pytest.mark.parametrize(("wish", "saved", "kind", "text"), RULES)
def test_broken_restore_rule_is_refused(wish, saved, kind, text):
    with pytest.raises(ValidationError) as caught:
        check_restore(wish, saved)

    assert type(caught.value) is kind
    assert str(caught.value) == text


def test_every_error_of_a_restore_has_a_row():
    own = {kind for kind in ValidationError.__subclasses__() if kind.__module__ == rules.__name__}
    assert own <= {kind for _, _, kind, _ in RULES}


@pytest.mark.parametrize(
    ("earlier", "later"), list(itertools.pairwise(RULES)), ids=lambda row: row[2].__name__
)
def test_of_two_neighbours_the_first_is_reported(earlier, later):
    (wish, saved, kind, text), (later_wish, later_saved, _, _) = earlier, later
    both = restore(
        **{
            name: getattr(wish, name) or getattr(later_wish, name)
            for name in ("net_fds", "vfio_fds", "zone_updates")
        },
        iommufd_fd=(wish if wish.vfio_fds else later_wish).iommufd_fd,
        prefault=wish.prefault,
        memory_restore_mode=wish.memory_restore_mode,
    )
    saved_both = VmConfig(
        net=saved.net or later_saved.net,
        devices=saved.devices or later_saved.devices,
        platform=saved.platform,
    )
    with pytest.raises(kind, match=re.escape(text)):
        check_restore(both, saved_both)


def test_restore_with_every_replacement_is_accepted_and_names_unused_entries():
    wish = restore(
        net_fds=[RestoredNetConfig(id="net0", num_fds=2), RestoredNetConfig(id="other", num_fds=1)]
    )
    assert check_restore(wish, NET_WITH_FDS) == ["other"]


def test_saved_vfio_descriptor_with_replacement_is_accepted():
    wish = restore(vfio_fds=[RestoredVfioConfig(id="gpu", fd=8)], iommufd_fd=9)
    assert check_restore(wish, SAVED_WITH_FD) == []
