"""A connection's way to the service: how its thread is woken, and a bell that nobody hears any more."""

import contextlib
import os
import resource
import select
import signal
import threading

import pytest

from cloudvmm.api import Empty, EventFd, ResponseRecv, api_channel
from cloudvmm.api.action import VmBoot
from cloudvmm.http.exchange import Bell, Exchange, RungReply
from cloudvmm.http.service import VmmService
from support.deadline import HOST_S
from support.process import state_of
from support.wait import wait_until


@pytest.fixture
def channel():
    sender, receiver = api_channel()
    event = EventFd()
    service = VmmService(event, sender)
    exchange = Exchange(service)
    yield exchange, receiver, event
    exchange.close()
    service.close()
    event.close()


@pytest.fixture
def bell():
    made = Bell()
    yield made
    made.close()


@contextlib.contextmanager
def no_descriptor_left():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def answering(receiver, event, answer):
    """Answer the next request, in a thread of its own."""

    def run():
        select.select([event], [], [], HOST_S)
        receiver.take().reply.send(answer)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_caller_that_waits_is_woken_by_its_answer(bell):
    reply = RungReply(bell)
    timer = threading.Timer(0, reply.send, [Empty()])
    timer.start()

    assert reply.recv() == Empty()
    timer.join(HOST_S)


def test_signal_that_hits_the_waiting_thread_costs_no_answer(bell):
    reply = RungReply(bell)
    waiter = threading.get_ident()
    struck = threading.Event()

    def strike():
        wait_until(lambda: state_of(os.getpid()) == "S", "the main thread sleeps", timeout_s=HOST_S)
        signal.pthread_kill(waiter, signal.SIGUSR1)
        struck.wait(HOST_S)
        reply.send(Empty())

    before = signal.signal(signal.SIGUSR1, lambda *_: struck.set())
    thread = threading.Thread(target=strike)
    thread.start()
    try:
        assert reply.recv() == Empty()
    finally:
        thread.join(HOST_S)
        signal.signal(signal.SIGUSR1, before)


def test_answer_that_was_there_before_the_caller_looked_needs_no_bell(bell):
    reply = RungReply(bell)
    reply.send(Empty())

    assert reply.recv() == Empty()


def test_ring_for_another_reply_is_not_taken_for_an_answer(bell):
    bell.ring()
    reply = RungReply(bell)
    timer = threading.Timer(0, reply.send, [Empty()])
    timer.start()

    assert reply.recv() == Empty()
    timer.join(HOST_S)


def test_second_answer_is_dropped(bell):
    reply = RungReply(bell)
    reply.send(Empty())
    reply.send(ResponseRecv())

    assert reply.recv() == Empty()


def test_ring_of_a_closed_bell_reaches_no_other_descriptor():
    bell = Bell()
    bell.close()
    other = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # has the number that was the bell's

    bell.ring()

    with pytest.raises(BlockingIOError):
        os.eventfd_read(other)
    os.close(other)


def test_call_is_answered_where_there_is_no_descriptor_for_a_bell(channel):
    exchange, receiver, event = channel
    thread = answering(receiver, event, Empty())

    with no_descriptor_left():
        assert exchange.call(VmBoot, None, []) == Empty()
    thread.join(HOST_S)


def test_cut_lets_the_waiting_caller_go(channel):
    exchange, _, _ = channel
    timer = threading.Timer(0, exchange.cut)
    timer.start()

    with pytest.raises(ResponseRecv):
        exchange.call(VmBoot, None, [])
    timer.join(HOST_S)
