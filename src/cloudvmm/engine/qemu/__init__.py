"""The engine that runs each VM as a QEMU process, controlled over QMP."""

from cloudvmm.engine.qemu.engine import QemuEngine

__all__ = ["QemuEngine"]
