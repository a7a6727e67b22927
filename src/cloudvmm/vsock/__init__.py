"""A vsock device whose other end is UNIX sockets: a program of its own, on top of `cloudvmm.vhost`.

Both ends speak the protocol of Cloud Hypervisor: a program of the host connects to the socket and writes
``CONNECT <port>``; what the guest connects to is found at ``<socket>_<port>``.
"""
