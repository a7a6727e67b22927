"""Our document next to Cloud Hypervisor's own: what that one names is in ours, or the page tells why not.

The names below are those of its `cloud-hypervisor.yaml`, version 0.3.0: members, or values, of each schema,
and the statuses of each operation.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cloudvmm.http.openapi import document

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "openapi.md").read_text(encoding="utf-8")
SCHEMAS = {
    "VmmPingResponse": "build_version version pid features",
    "VmState": "Created Running Shutdown Paused BreakPoint",
    "VmInfo": "config state memory_actual_size device_tree",
    "DeviceNode": "id resources children pci_bdf",
    "VmCounters": "",
    "PciDeviceInfo": "id bdf",
    "PayloadConfig": "firmware kernel cmdline initramfs igvm host_data",
    "VmConfig": (
        "cpus memory payload rate_limit_groups disks net rng balloon fs generic_vhost_user pmem serial "
        "console debug_console devices user_devices vdpa vsock numa iommu watchdog rtc pvpanic pci_segments "
        "platform tpm landlock_enable landlock_rules"
    ),
    "CpuAffinity": "vcpu host_cpus",
    "CpuFeatures": "amx",
    "CpuTopology": "threads_per_core cores_per_die dies_per_package packages",
    "CoreSchedulingMode": "Vm Vcpu Off",
    "CpusConfig": (
        "boot_vcpus max_vcpus topology kvm_hyperv max_phys_bits nested affinity features core_scheduling"
    ),
    "PciSegmentConfig": "pci_segment mmio32_aperture_weight mmio64_aperture_weight",
    "PlatformConfig": (
        "num_pci_segments iommu_segments iommu_address_width_bits system_serial_number serial_number "
        "system_uuid uuid oem_strings system_manufacturer system_product_name system_version system_family "
        "system_sku_number chassis_asset_tag tdx sev_snp iommufd vfio_p2p_dma"
    ),
    "MemoryZoneConfig": (
        "id size file mergeable shared hugepages hugepage_size host_numa_node hotplug_size hotplugged_size "
        "prefault reserve"
    ),
    "MemoryConfig": (
        "size hotplug_size hotplugged_size mergeable hotplug_method shared hugepages hugepage_size prefault "
        "reserve thp zones"
    ),
    "TokenBucket": "size one_time_burst refill_time",
    "RateLimiterConfig": "bandwidth ops",
    "RateLimitGroupConfig": "id rate_limiter_config",
    "VirtQueueAffinity": "queue_index host_cpus",
    "ImageType": "FixedVhd Qcow2 Raw Vhdx Unknown",
    "LockGranularity": "ByteRange Full",
    "DiskConfig": (
        "path readonly direct iommu num_queues queue_size vhost_user vhost_socket rate_limiter_config "
        "pci_segment pci_device_id id serial rate_limit_group queue_affinity backing_files sparse "
        "image_type lock_granularity"
    ),
    "NetConfig": (
        "tap ip mask mac host_mac mtu iommu num_queues queue_size vhost_user vhost_socket vhost_mode id "
        "pci_segment pci_device_id rate_limiter_config offload_tso offload_ufo offload_csum"
    ),
    "RngConfig": "id pci_segment pci_device_id iommu src",
    "RtcConfig": "id pci_segment pci_device_id iommu",
    "BalloonConfig": "id pci_segment pci_device_id iommu size deflate_on_oom free_page_reporting",
    "FsConfig": "tag socket num_queues queue_size pci_segment pci_device_id id",
    "GenericVhostUserConfig": "socket queue_sizes pci_segment pci_device_id id device_type",
    "PmemConfig": "file size iommu discard_writes pci_segment pci_device_id id",
    "ConsoleMode": "Off Pty Tty File Socket Null",
    "ConsoleConfig": "file socket mode iommu id pci_segment pci_device_id",
    "SerialConfig": "file socket mode",
    "DebugConsoleConfig": "file mode iobase",
    "DeviceConfig": "path iommu pci_segment pci_device_id id x_nv_gpudirect_clique x_exclude_mmap_bars",
    "UserDeviceConfig": "socket id pci_segment pci_device_id",
    "TpmConfig": "socket",
    "VdpaConfig": "path num_queues iommu pci_segment pci_device_id id",
    "VsockConfig": "cid socket iommu pci_segment pci_device_id id",
    "NumaDistance": "destination distance",
    "NumaConfig": "guest_numa_id cpus distances memory_zones pci_segments device_id",
    "VmResize": "desired_vcpus desired_ram desired_balloon",
    "VmResizeDisk": "id desired_size",
    "VmResizeZone": "id desired_ram",
    "VmRemoveDevice": "id",
    "VmSnapshotConfig": "destination_url",
    "VmCoredumpData": "destination_url",
    "MemoryRestoreMode": "Copy OnDemand",
    "RestoreConfig": "source_url prefault memory_restore_mode resume zone_updates",
    "ReceiveMigrationData": "receiver_url tls_dir memory_mode zone_updates",
    "MigrationMode": "Precopy Postcopy",
    "VmMemoryZoneUpdateData": "id host_numa_node",
    "TimeoutStrategy": "Cancel Ignore",
    "SendMigrationData": (
        "destination_url local downtime_ms timeout_s timeout_strategy connections tls_dir memory_mode"
    ),
    "VmAddUserDevice": "socket pci_segment pci_device_id",
    "LandlockConfig": "path access",
}
STATUSES = {
    "get /vmm.ping": "200",
    "put /vmm.shutdown": "204",
    "get /vm.info": "200 404",
    "get /vm.counters": "200",
    "put /vm.create": "204",
    "put /vm.delete": "204",
    "put /vm.boot": "204 404",
    "put /vm.pause": "204 404 405",
    "put /vm.resume": "204 404 405",
    "put /vm.shutdown": "204 404 405",
    "put /vm.reboot": "204 404 405",
    "put /vm.power-button": "204 404 405",
    "put /vm.resize": "204 404 429",
    "put /vm.resize-disk": "204 404 500",
    "put /vm.resize-zone": "204 404 500",
    "put /vm.add-device": "200 204 400 404 409",
    "put /vm.remove-device": "204 404",
    "put /vm.add-disk": "200 204 400 404 409 500",
    "put /vm.add-fs": "200 204 400 404 409 500",
    "put /vm.add-generic-vhost-user": "200 204 400 404 409 500",
    "put /vm.add-pmem": "200 204 400 404 409 500",
    "put /vm.add-net": "200 204 400 404 409 500",
    "put /vm.add-vsock": "200 204 400 404 409 500",
    "put /vm.add-vdpa": "200 204 400 404 409 500",
    "put /vm.add-user-device": "200 204 400 409 404",
    "put /vm.snapshot": "204 404 405",
    "put /vm.coredump": "204 404 405",
    "put /vm.nmi": "204",
    "put /vm.restore": "204 400 404 409",
    "put /vm.receive-migration": "204 500",
    "put /vm.send-migration": "204 500",
}
# What the reference never sends either, though its document says so.
NOT_SENT = {
    "put /vmm.shutdown": {"204"},
    "put /vm.pause": {"404", "405"},
    "put /vm.resume": {"404", "405"},
    "put /vm.shutdown": {"404", "405"},
    "put /vm.reboot": {"405"},
    "put /vm.power-button": {"404", "405"},
    "put /vm.snapshot": {"404", "405"},
    "put /vm.coredump": {"404", "405"},
    "put /vm.restore": {"404"},
}
OURS = document()


def other_names():
    """Return what the page says: the name of a schema there, and its name here."""
    _, _, section = PAGE.partition("## Next to Cloud Hypervisor's document")
    return dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|$", section, re.MULTILINE))


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_of_the_reference_is_here_with_every_member(name):
    schema = OURS["components"]["schemas"][other_names().get(name, name)]
    ours = schema.get("enum") or schema.get("properties", {})
    assert set(SCHEMAS[name].split()) <= set(ours)


@pytest.mark.parametrize("operation", STATUSES)
def test_operation_of_the_reference_is_here_with_every_status_that_is_sent(operation):
    method, path = operation.split()
    ours = OURS["paths"][path][method]["responses"]
    assert set(STATUSES[operation].split()) - set(ours) == NOT_SENT.get(operation, set())


def test_names_that_differ_are_of_schemas():
    assert set(other_names()) <= set(SCHEMAS)
    assert set(other_names()).isdisjoint(OURS["components"]["schemas"])
