"""The channel: one answer each, none lost when the receiving end closes."""

from __future__ import annotations

import threading

import pytest

from cloudvmm import api
from cloudvmm.api.action import VmmPing, VmPause
from support.deadline import HOST_S


def test_a_request_arrives_with_its_reply_channel():
    sender, receiver = api.api_channel()
    reply = api.ReplyChannel()

    sender.clone().send(VmmPing(None, reply))
    request = receiver.take()
    request.reply.send(api.Empty())

    assert reply.recv(timeout_s=1) == api.Empty()


def test_only_the_first_answer_counts():
    reply = api.ReplyChannel()
    reply.send(api.VmActionPayload(b"1"))
    reply.send(api.VmActionPayload(b"2"))

    assert reply.recv(timeout_s=1).body == b"1"
    with pytest.raises(api.ResponseRecv):
        reply.recv(timeout_s=0)


def test_an_error_that_was_sent_is_raised():
    reply = api.ReplyChannel()
    reply.send(api.VmPauseError())

    with pytest.raises(api.VmPauseError, match="^The VM could not be paused$"):
        reply.recv(timeout_s=1)


def test_a_closed_channel_refuses_and_gives_back_what_was_queued():
    sender, receiver = api.api_channel()
    queued = VmPause(None, api.ReplyChannel())
    sender.send(queued)

    assert receiver.close() == [queued]
    with pytest.raises(api.RequestSend):
        sender.send(VmPause(None, api.ReplyChannel()))


def test_no_request_slips_in_behind_the_close():
    sender, receiver = api.api_channel()
    accepted: list[VmPause] = []

    def produce() -> None:
        try:
            while True:
                request = VmPause(None, api.ReplyChannel())
                sender.send(request)
                accepted.append(request)
        except api.RequestSend:
            return

    threads = [threading.Thread(target=produce) for _ in range(4)]
    for thread in threads:
        thread.start()
    taken = []
    while len(taken) < 1000:
        request = receiver.take()
        if request is not None:
            taken.append(request)
    taken += receiver.close()
    for thread in threads:
        thread.join(HOST_S)

    assert {id(request) for request in accepted} == {id(request) for request in taken}


def test_a_closed_eventfd_is_an_error_of_its_own():
    sender, _ = api.api_channel()
    api_evt = api.EventFd()
    api_evt.close()

    with pytest.raises(api.EventFdWrite):
        api.vmm_ping(api_evt, sender)
