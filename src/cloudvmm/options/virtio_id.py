"""Names of virtio device types, as `--generic-vhost-user` takes them."""

from __future__ import annotations

from cloudvmm.options.error import GenericDeviceTypeInvalid, GenericDeviceTypeUnsupported, MissingKey
from cloudvmm.options.grammar import dequote
from cloudvmm.options.value import ValueType, parse_integer

# Numbers are those of the virtio specification, section "Device Types".
VIRTIO_IDS = {
    "net": 1, "block": 2, "console": 3, "rng": 4, "balloon": 5, "iomem": 6, "rpmsg": 7, "scsi": 8,
    "9p": 9, "mac80211_wlan": 10, "rproc_serial": 11, "caif": 12, "memory_balloon": 13, "gpu": 16,
    "clock": 17, "input": 18, "vsock": 19, "crypto": 20, "signal_dist": 21, "pstore": 22, "iommu": 23,
    "mem": 24, "sound": 25, "fs": 26, "pmem": 27, "rpmb": 28, "mac80211_hwsim": 29,
    "video_encoder": 30, "video_decoder": 31, "scmi": 32, "nitro_sec_mod": 33, "i2c": 34,
    "watchdog": 35, "can": 36, "dmabuf": 37, "param_serv": 38, "audio_policy": 39, "bt": 40,
    "gpio": 41, "rdma": 42, "camera": 43, "ism": 44, "spi": 45, "tee": 46, "cpu_balloon": 47,
    "media": 48, "usb": 49,
}  # fmt: skip

# The VMM must know of an IOMMU to translate addresses, and a back end cannot reset the guest.
_NOT_IN_A_BACK_END = (VIRTIO_IDS["iommu"], VIRTIO_IDS["watchdog"])


def parse_device_type(text: str | None) -> int:
    """Read a name, or a decimal number without leading zeros.

    :raises OptionError: when it is missing, unknown, or of a type no back end can serve.
    """
    if text is None:
        raise MissingKey("--generic-vhost-user", "device_type missing", hint=_HINT)
    number = VIRTIO_IDS.get(text)
    if number is None:
        try:
            if text[:1] not in tuple("123456789"):
                raise ValueError(text)
            number = parse_integer(text, 1, 0xFFFF_FFFF)
        except ValueError:
            raise GenericDeviceTypeInvalid(text, hint=_HINT) from None
    if number in _NOT_IN_A_BACK_END:
        raise GenericDeviceTypeUnsupported(text)
    return number


DEVICE_TYPE: ValueType[int] = ValueType(
    lambda text: parse_device_type(dequote(text)),
    lambda number: {known: name for name, known in VIRTIO_IDS.items()}.get(number, str(number)),
    syntax="<name>|<number>",
    choices=tuple(name for name, number in VIRTIO_IDS.items() if number not in _NOT_IN_A_BACK_END),
)
_HINT = f"device_type={'|'.join(DEVICE_TYPE.choices)}|<number>"
