"""cloudvmm: Cloud Hypervisor's VMM, API first, in Python, on QEMU."""

__version__ = "0.1.0"
