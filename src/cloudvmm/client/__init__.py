"""The Python client: one method per command, for any server that speaks Cloud Hypervisor's API."""
