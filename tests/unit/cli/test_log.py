"""The log's formats and levels."""

import contextlib
import io
import os
import re
import threading

import pytest

from cloudvmm.cli.error import LogFileCreation, LoggerFormat
from cloudvmm.cli.log import DEFAULT_FORMAT, Level, Logger, Record, compile_format, open_log
from cloudvmm.errors import error_chain

RECORD = Record(
    level=Level.WARN,
    text="message",
    thread="vmm",
    location="a.py:7",
    time_ns=1779350535_542701999,  # 2026-05-21 08:02:15 UTC
    elapsed_s=1.25,
)


def rendered(log_format):
    return "".join(render(RECORD) for render in compile_format(log_format))


@pytest.mark.parametrize(
    ("log_format", "text"),
    [
        (DEFAULT_FORMAT, "cloud-hypervisor:   1.250000s: <vmm> WARN:a.py:7 -- message"),
        ("{wallclock}", "2026-05-21T08:02:15.542701Z"),
        ("{glog}", "0521 08:02:15.542701"),
        ("{levelchar}|{level}", "W|WARN"),
        (
            "{year}-{month}-{day} {hour}.{minute}.{second}.{micros}{offset}",
            "2026-05-21 08.02.15.542701+00:00",
        ),
        ("{{{msg}}}", "{message}"),
        ("plain 100%", "plain 100%"),
        ("", ""),
    ],
)
def test_format_renders(log_format, text):
    assert rendered(log_format) == text


def test_local_time_has_the_zone_of_the_machine(monkeypatch):
    monkeypatch.setenv("TZ", "PST8")
    import time

    time.tzset()
    try:
        assert rendered("{localglog} {localhour} {localoffset}") == "0521 00:02:15.542701 00 -08:00"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_ids_are_those_of_the_process_and_thread():
    assert rendered("{pid} {tid}") == f"{os.getpid()} {threading.get_native_id()}"


@pytest.mark.parametrize(
    ("log_format", "text"),
    [
        ("{nope}", "Unknown format token '{nope}'"),
        ("{local}", "Unknown format token '{local}'"),
        ("{localboottime}", "Unknown format token '{localboottime}'"),
        ("{}", "Unknown format token '{}'"),
        ("a{msg", "Unterminated '{' in format string"),
        ("a}b", "Unmatched '}' in format string"),
    ],
)
def test_format_that_does_not_parse_is_refused(log_format, text):
    with pytest.raises(LoggerFormat) as caught:
        Logger(Level.INFO, io.BytesIO(), log_format)
    assert error_chain(caught.value) == ["Error parsing logger format", text]


def test_record_is_one_line_with_thread_and_location():
    sink = io.BytesIO()
    Logger(Level.INFO, sink).info("started", thread="vmm", location="loop.py:3")
    expected = rb"cloud-hypervisor: +\d\.\d{6}s: <vmm> INFO:loop.py:3 -- started\r\n"
    assert re.fullmatch(expected, sink.getvalue())


def test_thread_is_the_current_one_unless_given():
    sink = io.BytesIO()
    logger = Logger(Level.INFO, sink, "{thread}")
    worker = threading.Thread(target=logger.info, args=("x",), name="worker")
    worker.start()
    worker.join()
    logger.info("x")
    assert sink.getvalue() == b"worker\r\nmain\r\n"


@pytest.mark.parametrize(
    ("level", "written"),
    [
        (Level.WARN, b"e\r\nw\r\n"),
        (Level.INFO, b"e\r\nw\r\ni\r\n"),
        (Level.DEBUG, b"e\r\nw\r\ni\r\nd\r\n"),
        (Level.TRACE, b"e\r\nw\r\ni\r\nd\r\nt\r\n"),
    ],
)
def test_level_bounds_what_is_written(level, written):
    sink = io.BytesIO()
    logger = Logger(level, sink, "{msg}")
    logger.error("e")
    logger.warn("w")
    logger.info("i")
    logger.debug("d")
    logger.trace("t")
    assert sink.getvalue() == written


def test_text_of_a_record_that_is_not_written_is_never_made():
    sink = io.BytesIO()
    logger = Logger(Level.WARN, sink, "{msg}")
    made = []

    def text():
        made.append("made")
        return "text"

    logger.log("info", text)
    assert made == []
    logger.log("warn", text)
    assert (made, sink.getvalue()) == (["made"], b"text\r\n")


@pytest.mark.parametrize(("verbosity", "written"), [(0, b"w"), (1, b"wi"), (2, b"wid"), (9, b"widt")])
def test_log_file_is_truncated_and_verbosity_chooses_the_level(tmp_path, verbosity, written):
    log_file = tmp_path / "log"
    log_file.write_bytes(b"old")
    logger = open_log(verbosity=verbosity, log_file=str(log_file), log_format="{msg}")
    for level, text in (("warn", "w"), ("info", "i"), ("debug", "d"), ("trace", "t")):
        logger.log(level, text)
    logger.close()
    assert log_file.read_bytes().replace(b"\r\n", b"") == written


def test_log_file_that_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(LogFileCreation) as caught:
        open_log(verbosity=0, log_file=str(tmp_path))
    assert error_chain(caught.value)[0] == "Error creating log file"
    assert "Is a directory" in error_chain(caught.value)[1]


def test_broken_sink_loses_the_record_and_nothing_else():
    sink = io.BytesIO()
    sink.close()
    assert Logger(Level.INFO, sink).info("lost") is None


def test_pipe_without_room_loses_records_and_says_so_once_there_is_room():
    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb", buffering=0) as reader, open(write_fd, "wb", buffering=0) as sink:
        os.set_blocking(write_fd, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(write_fd, b"x" * 4096):
                pass
        os.set_blocking(write_fd, True)
        log = Logger(Level.INFO, sink, "{level} {msg}")
        log.error("lost")
        log.error("lost too")
        reader.read(1 << 20)
        log.error("heard")
        assert reader.read(4096) == (
            b"WARN 2 records were lost: the log could not be written\r\nERROR heard\r\n"
        )
