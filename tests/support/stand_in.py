"""A program that is started as Cloud Hypervisor is and answers what benchmarks ask of one: no VMM at all.

stand_in.py --api-socket PATH
stand_in.py --version
"""

from __future__ import annotations

import os
import socketserver
import sys

OPENING = b"HTTP/1.1 %b\r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n"
ANSWERS = {
    b"GET /api/v1/vmm.ping": b'{"build_version":"v54.0.0","version":"54.0.0","pid":1,"features":[]}',
    b"GET /api/v1/vm.info": b'{"config":{},"state":"Created","memory_actual_size":536870912}',
    b"PUT /api/v1/vm.create": b"",
    b"PUT /api/v1/vm.delete": b"",
}


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while line := self.rfile.readline():
            length = 0
            while (header := self.rfile.readline()).strip():
                name, _, value = header.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            self.rfile.read(length)
            self.wfile.write(answer(b" ".join(line.split()[:2])))


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


def answer(request: bytes) -> bytes:
    body = ANSWERS.get(request)
    if body is None:
        return OPENING % b"404 Not Found" + b"Content-Length: 0\r\n\r\n"
    if not body:
        return OPENING % b"204 No Content" + b"\r\n"
    return OPENING % b"200 OK" + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


if __name__ == "__main__":
    if "--version" in sys.argv:
        print("cloud-hypervisor v54.0.0")
        sys.exit()
    os.umask(0o077)
    Server(sys.argv[sys.argv.index("--api-socket") + 1], Handler).serve_forever()
