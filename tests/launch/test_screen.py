"""Rank 0 on the terminal: the same bytes, the same kind of terminal, and never in the way of the launcher."""
from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest

from ms_diffsynth.launch.screen import Screen

BAR = """
import os, sys, time
print("ünï", os.get_terminal_size(), sys.stdout.isatty(), sys.stderr.isatty(), flush=True)
for k in range(5):
    sys.stderr.write(f"\\r{k * 25:3}%|{'#' * k}")
    sys.stderr.flush()
sys.stderr.write("\\n\\x1b[31mred\\x1b[0m\\n")
print("one\\ntwo\\n" * 2000, end="no newline")
"""


@contextlib.contextmanager
def terminal(columns=77, rows=33):
    """A terminal: yields the side a program writes to, and a function that returns what has arrived."""
    screen, line = os.openpty()
    fcntl.ioctl(line, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    os.set_blocking(screen, False)
    seen = bytearray()

    def read(seconds=0.0):
        """All there is, and what comes within so many seconds of the last: the system passes it on by itself."""
        with contextlib.suppress(OSError):
            while select.select([screen], [], [], seconds)[0]:
                seen.extend(os.read(screen, 65536))
        return bytes(seen)

    yield line, read
    os.close(line)
    os.close(screen)


def shown(command, targets, log, read):
    """Run a command behind a Screen, reading the terminal while it runs."""
    screen = Screen(log, targets)
    process = subprocess.Popen(command, stdout=screen.outputs[0], stderr=screen.outputs[1], stdin=subprocess.DEVNULL)
    screen.started()
    while process.poll() is None:
        screen.wait(0.05)
        read()
    finish = threading.Thread(target=screen.finish, args=(60,))  # what is left is passed on as it is read
    finish.start()
    while finish.is_alive():
        read(0.01)
    return read(0.5)


def test_a_terminal_sees_the_same_bytes_as_without_a_launcher(tmp_path):
    command = [sys.executable, "-c", BAR]
    with terminal() as (line, read):
        process = subprocess.Popen(command, stdout=line, stderr=line, stdin=subprocess.DEVNULL)
        while process.poll() is None:
            read()
            time.sleep(0.01)
        direct = read(0.5)
    with terminal() as (line, read):
        found = shown(command, (line, line), tmp_path / "log", read)
    assert b"columns=77, lines=33) True True" in direct and b"\r 25%|#\r 50%|##" in direct
    assert found == direct + b"\r\n", "and ends the line that was not"
    log = (tmp_path / "log").read_bytes()
    assert b"\r" not in log and b"\n100%|####\n" in log and b"25%" not in log
    assert log.endswith(b"two\nno newline\n") and log.startswith("ünï".encode())


NOISE = "[INFO] DISTRIBUTED(7,7f,python):2026-11-21 [tcp_client.cc:367] Start] Event base dispatch success!"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_what_mindspore_says_when_a_worker_leaves_is_in_the_log_alone(tmp_path, size):
    """In whatever pieces it comes. Lines that only begin so, and what never ends, are shown."""
    text = f"one {NOISE}\n{NOISE}\n{NOISE}\n\n[INFO] DISTRIBUTED(kept\n[INFO\n{NOISE}\n[INFO] DIST"
    code = ("import sys, time\n"
            f"for start in range(0, {len(text)}, {size}):\n"
            f"    print({text!r}[start:start + {size}], end='', flush=True)\n    time.sleep({size / 2000})")
    with terminal() as (line, read):
        found = shown([sys.executable, "-c", code], (line, line), tmp_path / "log", read)
    expected = f"one {NOISE}\n\n[INFO] DISTRIBUTED(kept\n[INFO\n[INFO] DIST\n"
    assert found.decode() == expected.replace("\n", "\r\n")
    assert (tmp_path / "log").read_text() == text + "\n"


def test_a_terminal_that_changes_its_size(tmp_path):
    code = ("import os, sys, time\nfor _ in range(200):\n    time.sleep(0.02)\n    print('.', end='', flush=True)\n"
            "    if os.get_terminal_size().columns == 99: sys.exit(print('wide'))")
    with terminal() as (line, read):
        fcntl.ioctl(line, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
        screen = Screen(tmp_path / "log", (line, line))
        process = subprocess.Popen([sys.executable, "-c", code], stdout=screen.outputs[0], stderr=screen.outputs[1])
        screen.started()
        while process.poll() is None:
            screen.wait(0.05)
            if read():
                fcntl.ioctl(line, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
        screen.finish(5)
        assert b"wide" in read()


def test_stdout_and_stderr_stay_apart(tmp_path):
    with open(tmp_path / "out", "wb") as out, terminal() as (line, read):
        shown([sys.executable, "-c", "import sys; print(1, sys.stdout.isatty()); sys.stderr.write('2\\n')"],
              (out.fileno(), line), tmp_path / "log", read)
        assert read() == b"2\r\n"
    assert (tmp_path / "out").read_bytes() == b"1 False\n"
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["1 False", "2"]


@pytest.mark.parametrize("how", ["closed", "nobody reads"])
def test_a_terminal_that_goes_away_is_no_reason_to_stop(tmp_path, how):
    reader, writer = os.pipe()
    os.close(reader)
    if how == "closed":
        os.close(writer)
    shown([sys.executable, "-c", "print('x' * 100000)"], (writer, writer), tmp_path / "log", lambda *_: b"")
    if how != "closed":
        os.close(writer)
    assert (tmp_path / "log").stat().st_size == 100001


@pytest.mark.parametrize("make", [os.pipe, os.openpty], ids=["pipe", "terminal"])
def test_a_terminal_that_is_paused_holds_up_the_process_and_not_the_launcher(tmp_path, make):
    reader, writer = make()
    screen = Screen(tmp_path / "log", (writer, writer))
    process = subprocess.Popen([sys.executable, "-c", "print('x' * 10**6)"], stdout=screen.outputs[0])
    screen.started()
    for _ in range(1000):
        began = time.monotonic()
        screen.wait(0.2)
        assert time.monotonic() - began < 2, "it waited for the terminal"
        if time.monotonic() - began > 0.19:
            break
    assert process.poll() is None, "it waits"
    process.kill()
    process.wait()
    began = time.monotonic()
    screen.finish(0.5)
    assert time.monotonic() - began < 3
    os.close(reader)
    os.close(writer)


def test_a_bar_that_is_drawn_for_days_takes_no_memory(tmp_path):
    with open(os.devnull, "wb") as out:
        screen = Screen(tmp_path / "log", (out.fileno(), out.fileno()))
        code = "for k in range(50000): print(f'\\r{k:9}', end='')\nprint('\\r')"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=screen.outputs[0])
        screen.started()
        longest = 0
        while process.poll() is None:
            screen.wait(0.1)
            longest = max(longest, len(screen._channels[0]._line))
        screen.finish(5)
    assert longest < 100 and (tmp_path / "log").read_text().strip() == "49999"
