"""Words on the command line into the bytes that are sent."""

import io
import os

import pytest

from cloudvmm.cli.remote.error import RemoteError
from cloudvmm.cli.remote.parser import parse_args
from cloudvmm.cli.remote.request import Request
from cloudvmm.cli.remote.request import make_request as make_remote_request
from cloudvmm.client.exchange import make_request as make_http_request
from cloudvmm.errors import error_chain

DISK = (
    '"num_queues":1,"queue_size":128,"vhost_user":false,{limiter}"disable_io_uring":false,"disable_aio":false,'
    '{serial}"backing_files":false,"sparse":true,"image_type":"{image}","lock_granularity":"ByteRange"}}'
)
NET = (
    '"queue_size":256,"vhost_user":false,"vhost_mode":"Client","offload_tso":true,"offload_ufo":true,'
    '"offload_csum":true}'
)
SEND = (
    '{{"destination_url":"{url}","local":{local},"preserve_source":{preserve},"downtime_ms":{downtime},'
    '"timeout_s":{timeout},"timeout_strategy":"{strategy}","connections":{connections},"tls_dir":null,'
    '"memory_mode":"{mode}"}}'
)
PLAIN_SEND = {
    "local": "false",
    "preserve": "false",
    "downtime": 300,
    "timeout": 3600,
    "strategy": "Cancel",
    "connections": 1,
    "mode": "Precopy",
}
RESTORE = '"prefault":false,"memory_restore_mode":"Copy"'


def request_of(*argv):
    return make_remote_request(parse_args(argv, program="cloudvmm-remote"))


def raw_of(request: Request) -> bytes:
    return make_http_request(request.method, request.command, request.body, request.fds).raw


WITHOUT_BODY = [
    ("boot", "PUT", "vm.boot"),
    ("counters", "GET", "vm.counters"),
    ("delete", "PUT", "vm.delete"),
    ("info", "GET", "vm.info"),
    ("nmi", "PUT", "vm.nmi"),
    ("pause", "PUT", "vm.pause"),
    ("ping", "GET", "vmm.ping"),
    ("power-button", "PUT", "vm.power-button"),
    ("reboot", "PUT", "vm.reboot"),
    ("resume", "PUT", "vm.resume"),
    ("shutdown", "PUT", "vm.shutdown"),
    ("shutdown-vmm", "PUT", "vmm.shutdown"),
]


@pytest.mark.parametrize(("name", "method", "command"), WITHOUT_BODY, ids=lambda value: value)
def test_bytes_without_a_body(name, method, command):
    expected = f"{method} /api/v1/{command} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n"
    assert raw_of(request_of(name)) == expected.encode()


WITH_BODY = [
    (["add-device", "path=/sys/d"], '{"pci_segment":0,"path":"/sys/d","x_exclude_mmap_bars":[]}'),
    (
        ["add-device", "path=/d,id=g,iommu=on,pci_segment=1,pci_device_id=4,x_exclude_mmap_bars=[0,2-3]"],
        '{"id":"g","iommu":true,"pci_segment":1,"pci_device_id":4,"path":"/d","x_exclude_mmap_bars":[0,2,3]}',
    ),
    (
        ["add-disk", "path=/x"],
        '{"pci_segment":0,"path":"/x","readonly":false,"direct":false,'
        + DISK.format(limiter="", serial="", image="Unknown"),
    ),
    (
        ["add-disk", 'path="/x,y",readonly=on,bw_size=1,bw_refill_time=2,serial=s,image_type=QCOW2'],
        '{"pci_segment":0,"path":"/x,y","readonly":true,"direct":false,'
        + DISK.format(
            limiter='"rate_limiter_config":{"bandwidth":{"size":1,"one_time_burst":0,"refill_time":2},"ops":null},',
            serial='"serial":"s",',
            image="Qcow2",
        ),
    ),
    (
        ["add-fs", "tag=t,socket=/s"],
        '{"pci_segment":0,"tag":"t","socket":"/s","num_queues":1,"queue_size":1024}',
    ),
    (
        ["add-generic-vhost-user", "device_type=26,socket=/s,queue_sizes=[1024,512]"],
        '{"pci_segment":0,"socket":"/s","queue_sizes":[1024,512],"device_type":26}',
    ),
    (["add-net", "tap=t0"], '{"pci_segment":0,"tap":"t0","num_queues":2,' + NET),
    (["add-net", ""], '{"pci_segment":0,"num_queues":2,' + NET),
    (
        ["add-net", "mac=12:34:56:78:90:AB,ip=10.0.0.1,mask=255.255.255.0,num_queues=4"],
        '{"pci_segment":0,"ip":"10.0.0.1","mask":"255.255.255.0","mac":"12:34:56:78:90:ab","num_queues":4,'
        + NET,
    ),
    (
        ["add-pmem", "file=/p,size=1G"],
        '{"pci_segment":0,"file":"/p","size":1073741824,"discard_writes":false}',
    ),
    (["add-user-device", "socket=/s,id=u"], '{"id":"u","pci_segment":0,"socket":"/s"}'),
    (["add-vdpa", "path=/v"], '{"pci_segment":0,"path":"/v","num_queues":1}'),
    (["add-vsock", "cid=3,socket=/s"], '{"pci_segment":0,"cid":3,"socket":"/s"}'),
    (["coredump", "file:///c"], '{"destination_url":"file:///c"}'),
    (["remove-device", "_disk0"], '{"id":"_disk0"}'),
    (["resize"], '{"desired_vcpus":null,"desired_ram":null,"desired_balloon":null}'),
    (
        ["resize", "--cpus", "4", "--memory=1G", "--balloon", " 512K"],
        '{"desired_vcpus":4,"desired_ram":1073741824,"desired_balloon":524288}',
    ),
    (["resize-disk", "--size", "2M", "--disk", "d"], '{"id":"d","desired_size":2097152}'),
    (["resize-zone", "--id", "z", "--size", "+7"], '{"id":"z","desired_ram":7}'),
    (
        ["restore", "source_url=file:///s"],
        f'{{"source_url":"file:///s",{RESTORE},"net_fds":null,"vfio_fds":null,"iommufd_fd":null,'
        '"resume":false,"zone_updates":[]}',
    ),
    (
        ["restore", "source_url=file:///s,memory_restore_mode=ondemand,resume=on,zone_updates=[z@1]"],
        '{"source_url":"file:///s","prefault":false,"memory_restore_mode":"OnDemand","net_fds":null,'
        '"vfio_fds":null,"iommufd_fd":null,"resume":true,"zone_updates":[{"id":"z","host_numa_node":1}]}',
    ),
    (
        ["receive-migration", "receiver_url=tcp:[::1]:7,memory_mode=postcopy"],
        '{"receiver_url":"tcp:[::1]:7","tls_dir":null,"memory_mode":"Postcopy","vfio_fds":null,'
        '"iommufd_fd":null,"zone_updates":[]}',
    ),
    (
        ["receive-migration", "unix:/m=1,a"],
        '{"receiver_url":"unix:/m=1,a","tls_dir":null,"memory_mode":"Precopy","vfio_fds":null,'
        '"iommufd_fd":null,"zone_updates":[]}',
    ),
    (
        ["send-migration", "destination_url=tcp:h:1,connections=8,downtime_ms=1,timeout_strategy=ignore"],
        SEND.format(url="tcp:h:1", **{**PLAIN_SEND, "connections": 8, "downtime": 1, "strategy": "Ignore"}),
    ),
    (
        ["send-migration", "destination_url=unix:/m,local=on,preserve_source=on"],
        SEND.format(url="unix:/m", **{**PLAIN_SEND, "local": "true", "preserve": "true"}),
    ),
    (["send-migration", "tcp:h:1"], SEND.format(url="tcp:h:1", **PLAIN_SEND)),
    (
        ["send-migration", "--local", "unix:/m"],
        SEND.format(url="unix:/m", **{**PLAIN_SEND, "local": "true"}),
    ),
    (
        ["send-migration", "unix:/m", "--local"],
        SEND.format(url="unix:/m", **{**PLAIN_SEND, "local": "true"}),
    ),
    (["snapshot", "file:///s"], '{"destination_url":"file:///s"}'),
]


@pytest.mark.parametrize(("argv", "body"), WITH_BODY, ids=lambda value: " ".join(value)[:60])
def test_bytes_with_a_body(argv, body):
    request = request_of(*argv)
    expected = (
        f"PUT /api/v1/vm.{argv[0]} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )
    assert raw_of(request) == expected.encode()
    assert request.fds == ()


DESCRIPTORS = [
    (["add-device", "fd=7,id=g"], '{"id":"g","pci_segment":0,"x_exclude_mmap_bars":[]}', (7,)),
    (["add-net", "fd=[4,9,5],num_queues=6"], '{"pci_segment":0,"num_queues":6,' + NET, (4, 9, 5)),
    (["add-net", "fd=4"], '{"pci_segment":0,"num_queues":2,' + NET, (4,)),
    (
        ["restore", "source_url=file:///s,net_fds=[a@[4,5],b@[6]],vfio_fds=[v@8,w@7],iommufd_fd=3"],
        f'{{"source_url":"file:///s",{RESTORE},"net_fds":[{{"id":"a","num_fds":2,"fds":null}},'
        '{"id":"b","num_fds":1,"fds":null}],"vfio_fds":[{"id":"v","fd":null},{"id":"w","fd":null}],'
        '"iommufd_fd":null,"resume":false,"zone_updates":[]}',
        (4, 5, 6, 8, 7, 3),
    ),
    (
        ["receive-migration", "receiver_url=unix:/m,iommufd_fd=3,vfio_fds=[v@8,w@7]"],
        '{"receiver_url":"unix:/m","tls_dir":null,"memory_mode":"Precopy",'
        '"vfio_fds":[{"id":"v","fd":null},{"id":"w","fd":null}],"iommufd_fd":null,"zone_updates":[]}',
        (8, 7, 3),
    ),
]


@pytest.mark.parametrize(("argv", "body", "fds"), DESCRIPTORS, ids=[case[0][0] for case in DESCRIPTORS])
def test_descriptors_leave_the_body_and_keep_the_servers_order(argv, body, fds):
    request = request_of(*argv)
    assert (request.body, request.fds) == (body.encode(), fds)


def test_create_sends_a_file_unchanged(tmp_path):
    text = b' {"cpus": \t{"boot_vcpus": 1}}\n'
    path = tmp_path / "vm.json"
    path.write_bytes(text)
    assert request_of("create", str(path)).body == text


@pytest.mark.parametrize("argv", [["create"], ["create", "-"]], ids=["bare", "dash"])
def test_create_reads_standard_input(argv, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda fd, mode, closefd: io.BytesIO(b"{}" if fd == 0 else b""))
    assert request_of(*argv).body == b"{}"


def test_create_with_nothing_has_an_empty_body():
    raw = raw_of(request_of("create", os.devnull))
    assert raw.endswith(b"Accept: */*\r\nContent-Length: 0\r\n\r\n")


def test_stream_takes_no_body():
    assert request_of("events").body is None


REFUSED = [
    (["add-device", "x"], ["Error parsing device syntax", "Error parsing --device", "Unknown option: x"]),
    (["add-disk", "path"], ["Error parsing disk syntax", "Error parsing --disk", "Invalid syntax: path"]),
    (["add-fs", "tag=t"], ["Error parsing filesystem syntax", "Error parsing --fs: socket missing"]),
    (
        ["add-generic-vhost-user", "socket=/s"],
        ["Error parsing generic vhost-user syntax", "Error parsing --generic-vhost-user: queue size missing"],
    ),
    (
        ["add-net", "mtu=x"],
        ["Error parsing network syntax", "Error parsing --net", "Unable to convert x for mtu"],
    ),
    (
        ["add-pmem", "size=1"],
        ["Error parsing persistent memory syntax", "Error parsing --pmem: file missing"],
    ),
    (
        ["add-user-device", ""],
        ["Error parsing user device syntax", "Error parsing --user-device: socket missing"],
    ),
    (["add-vdpa", ""], ["Error parsing vDPA device syntax", "Error parsing --vdpa: path missing"]),
    (["add-vsock", "socket=/s"], ["Error parsing vsock syntax", "Error parsing --vsock: cid missing"]),
    (
        ["restore", "resume=on"],
        ["Error parsing restore syntax", "Error parsing --restore: source_url missing"],
    ),
    (["resize", "--cpus", "x"], ["Error parsing CPU count", "invalid digit found in string"]),
    (["resize", "--cpus", ""], ["Error parsing CPU count", "cannot parse integer from empty string"]),
    (
        ["resize", "--cpus", "4294967296"],
        ["Error parsing CPU count", "number too large to fit in target type"],
    ),
    (["resize", "--memory", "512m"], ["Error parsing memory size", "Invalid value: 512m"]),
    (["resize", "--balloon", "1.5G"], ["Error parsing balloon size", "Invalid value: 1.5"]),
    (["resize", "--memory", '"1"'], ["Error parsing memory size", 'Invalid value: "1"']),
    (["resize-disk", "--disk", "d", "--size", ""], ["Invalid disk size", "Invalid value: "]),
    (["resize-zone", "--id", "z", "--size", "1T"], ["Error parsing memory size", "Invalid value: 1T"]),
    (
        ["send-migration", "local=on"],
        [
            "Error parsing send migration configuration",
            "Error parsing send migration parameters",
            "Invalid syntax: destination_url is required",
        ],
    ),
    (
        ["send-migration", "destination_url=unix:/m,connections=2"],
        [
            "Error parsing send migration configuration",
            "Error validating send migration parameters: "
            "UNIX sockets and connections option cannot be used at the same time.",
        ],
    ),
    (
        ["send-migration", "--local", "tcp:h:1"],
        [
            "Error parsing send migration configuration",
            "Error validating send migration parameters: local option is only supported with UNIX sockets.",
        ],
    ),
    (
        ["receive-migration", "receiver_url=udp:x"],
        [
            "Error parsing receive migration configuration",
            "Expected receiver_url to either use `tcp` or `unix` prefix",
        ],
    ),
    (
        ["create", "/nowhere/vm.json"],
        ["Error reading from file", "No such file or directory: /nowhere/vm.json (os error 2)"],
    ),
]


@pytest.mark.parametrize(("argv", "chain"), REFUSED, ids=lambda value: " ".join(value)[:60])
def test_refusal_says_what_was_wrong(argv, chain):
    with pytest.raises(RemoteError) as caught:
        request_of(*argv)
    assert error_chain(caught.value) == chain


def test_create_refuses_what_is_no_text(tmp_path):
    path = tmp_path / "vm.json"
    path.write_bytes(b"\xff")
    with pytest.raises(RemoteError) as caught:
        request_of("create", str(path))
    assert error_chain(caught.value) == ["Error reading from file", "stream did not contain valid UTF-8"]
