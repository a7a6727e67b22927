"""The engine that runs each VM as a QEMU process, controlled over QMP."""
