"""The control loop: one thread that owns the VM, answers who reads it and orders who changes it.

It waits for: requests (the API eventfd), the exit eventfd (signals), outcomes of the worker and of the
reader, and events of the machine. It never waits for anything else: what takes time runs beside it
(`runner`, `reader`), while reads are answered from what is committed. A fault in its own code ends the VMM
in an orderly way; every request that was taken is answered whatever happens.

Here is the waiting, and the answer to who only asks who is there. All else is `dispatch.py`'s.
"""

from __future__ import annotations

import select

from cloudvmm.api.ping import Ping
from cloudvmm.api.plumbing import VmmShuttingDown
from cloudvmm.control.failure import failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cloudvmm.api.action import ApiRequest
    from cloudvmm.api.channel import ApiReceiver
    from cloudvmm.api.ping import Pong
    from cloudvmm.control.dispatch import Dispatch
    from cloudvmm.control.runner import Log
    from cloudvmm.errors import VmmError
    from cloudvmm.host.eventfd import EventFd

ABORT_RETRY_S = 0.1

# No descriptor or thread for what carries out requests, nor to read its code with.
_SHORTAGES = (OSError, RuntimeError, ImportError)


class ControlLoop:
    """Made and run by one thread; `failure` is why it ended, if not because it was asked to.

    `make_dispatch` gives what carries out requests, once there is one; it gets `listen` and `unlisten`.
    """

    def __init__(
        self,
        make_dispatch: Callable[[ControlLoop], Dispatch],
        *,
        receiver: ApiReceiver,
        api_evt: EventFd,
        exit_evt: EventFd,
        ping: Pong,
        log: Log,
    ) -> None:
        self._make_dispatch = make_dispatch
        self._dispatch: Dispatch | None = None
        self._receiver = receiver
        self._exit_evt = exit_evt
        self._ping = ping
        self._log = log
        self._is_void = False  # told to leave before there was anything to end
        self._on_readable: dict[int, Callable[[], None]] = {}
        self._epoll = select.epoll()
        # Told of once for each ring, so that nobody need read it: who reads gives the interpreter up, to the
        # caller that is on its way to sleep, and must be woken to go on.
        self.listen(api_evt.fileno(), self._on_requests, select.EPOLLIN | select.EPOLLET)
        self.listen(exit_evt.fileno(), self._on_exit)

    @property
    def failure(self) -> VmmError | None:
        return None if self._dispatch is None else self._dispatch.failure

    def listen(self, fd: int, handler: Callable[[], None], when: int = select.EPOLLIN) -> None:
        """Call `handler` whenever `fd` is readable, or on those events of epoll's."""
        self._on_readable[fd] = handler
        self._epoll.register(fd, when)

    def unlisten(self, fd: int) -> None:
        if self._on_readable.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def adopt(self) -> bool:
        """Blocking. As `Dispatch.adopt`, to be done before `run`."""
        return self._dispatched().adopt()

    def close(self) -> None:
        """End without having run; every request that was taken is answered."""
        self._end()

    def run(self) -> None:
        """Serve until told to leave; on return every request has its answer and nothing is left behind.

        :raises Exception: what carries out requests cannot be made.
        """
        try:
            while not self._is_over():
                dispatch = self._dispatch
                is_leaving = dispatch is not None and dispatch.is_leaving
                for fd, _ in self._epoll.poll(ABORT_RETRY_S if is_leaving else None):
                    handler = self._on_readable.get(fd)
                    if handler is not None:
                        self._handle(handler)
                dispatch = self._dispatch
                if dispatch is not None and dispatch.is_leaving and not dispatch.has_left:
                    dispatch.abort()
        finally:
            self._end()

    def _is_over(self) -> bool:
        return self._is_void or (self._dispatch is not None and self._dispatch.has_left)

    def _handle(self, handler: Callable[[], None]) -> None:
        try:
            handler()
        except Exception as fault:
            if self._dispatch is None:
                raise
            self._dispatch.fail(fault)
        if self._dispatch is not None:
            self._dispatch.send_answers()

    def _end(self) -> None:
        left = self._receiver.close()
        if self._dispatch is not None:
            self._dispatch.end(left)
        else:
            for request in left:
                request.reply.send(failed(request.error, VmmShuttingDown()))
        self._epoll.close()

    def _on_requests(self) -> None:
        while (request := self._receiver.take()) is not None:
            try:
                self._accept(request)
            except Exception as fault:
                request.reply.send(failed(request.error, fault))
                raise

    def _accept(self, request: ApiRequest | Ping) -> None:
        if isinstance(request, Ping):
            self._log("debug", "API request event: VmmPing")
            request.reply.send(self._ping)
            return
        try:
            dispatch = self._dispatched()
        except _SHORTAGES as error:  # there may be one later
            request.reply.send(failed(request.error, error))
        else:
            dispatch.accept(request)

    def _on_exit(self) -> None:
        self._exit_evt.read()
        try:
            dispatch = self._dispatched()
        except _SHORTAGES as error:  # there is no VM to end either
            self._log("warn", f"The VMM ends without having begun: {error}")
            self._is_void = True
        else:
            dispatch.leave()

    def _dispatched(self) -> Dispatch:
        """:raises Exception: there is none yet, and it cannot be made."""
        if self._dispatch is None:
            self._dispatch = self._make_dispatch(self)
        return self._dispatch
