"""The channel into the VMM thread: an eventfd says that something is pending, a queue holds what.

Rules, after Cloud Hypervisor's `vmm/src/api/mod.rs`:

* Any number of threads may hold clones of the sender and of the eventfd; one thread receives.
* A request carries the sending end of its own one-shot reply channel.
* Every request that was accepted gets exactly one answer, also when the VMM thread ends: `close` refuses what
  comes later (`RequestSend`) and answers what is still queued.
"""

from __future__ import annotations

import queue
import threading

from cloudvmm.api.plumbing import ApiError, RequestSend, ResponseRecv

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    from cloudvmm.api.action import ApiRequest
    from cloudvmm.api.data import ApiResponsePayload
    from cloudvmm.api.ping import Ping

    Request: TypeAlias = ApiRequest | Ping
    ApiResponse: TypeAlias = ApiResponsePayload | ApiError


class ReplyChannel:
    """One answer from the VMM thread to one caller; a second answer is dropped."""

    __slots__ = ("_answers", "_sent")

    def __init__(self) -> None:
        self._answers: queue.SimpleQueue[ApiResponse] = queue.SimpleQueue()
        self._sent = False

    def send(self, response: ApiResponse) -> None:
        """Answer; never blocks."""
        if not self._sent:
            self._sent = True
            self._answers.put(response)

    def recv(self, timeout_s: float | None = None) -> ApiResponsePayload:
        """Wait for the answer and return it, or raise the error that it is.

        :raises ApiError: the command failed.
        :raises ResponseRecv: no answer within `timeout_s`; the command may or may not have run.
        """
        response = self._answers.get() if timeout_s is None else self._get_within(timeout_s)
        if isinstance(response, ApiError):
            raise response
        return response

    def _get_within(self, timeout_s: float) -> ApiResponse:
        try:
            return self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise ResponseRecv from None


class ApiReceiver:
    """The VMM thread's end."""

    __slots__ = ("_closed", "_lock", "_requests")

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False

    def sender(self) -> ApiSender:
        return ApiSender(self)

    def put(self, request: Request) -> None:
        # The lock closes the gap between the check and the put: without it a request could slip in behind
        # the last drain and never be answered.
        with self._lock:
            if self._closed:
                raise RequestSend
            self._requests.put(request)

    def take(self) -> Request | None:
        """Return the next request, or None; never blocks."""
        # Nobody else takes, so what is there stays there.
        return None if self._requests.empty() else self._requests.get_nowait()

    def close(self) -> list[Request]:
        """Refuse what comes from now on; return what is queued, for the caller to answer."""
        with self._lock:
            self._closed = True
        left = []
        while (request := self.take()) is not None:
            left.append(request)
        return left


class ApiSender:
    """A caller's end; clones share the channel."""

    __slots__ = ("_receiver",)

    def __init__(self, receiver: ApiReceiver) -> None:
        self._receiver = receiver

    def send(self, request: Request) -> None:
        """Queue `request`; the caller rings the eventfd next.

        :raises RequestSend: the VMM thread has ended.
        """
        self._receiver.put(request)

    def clone(self) -> ApiSender:
        return ApiSender(self._receiver)


def api_channel() -> tuple[ApiSender, ApiReceiver]:
    """Make a channel; the receiving end goes to the VMM thread."""
    receiver = ApiReceiver()
    return receiver.sender(), receiver
