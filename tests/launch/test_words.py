"""The last exception of a log, among all that MindSpore and the interpreter write around it."""
from __future__ import annotations

import pytest

from ms_diffsynth.launch.log_tail import last_exception, last_place

TRACEBACK = 'Traceback (most recent call last):\n  File "a.py", line 3, in <module>\n    f()\n{}\n'
MINDSPORE = "RuntimeError: Launch failed\n\n{0}\n- C++ Call Stack: (For framework developers)\n{0}\nop.cc:671 Run\n"


@pytest.mark.parametrize("text, expected", [
    ("", ""),
    ("step 1\nstep 2\n", ""),
    (TRACEBACK.format("ValueError: boom"), "ValueError: boom"),
    (TRACEBACK.format("KeyboardInterrupt"), "KeyboardInterrupt"),
    (TRACEBACK.format("mine.Strange: without a usual name"), "mine.Strange: without a usual name"),
    (TRACEBACK.format(MINDSPORE.format("-" * 50)) + "[INFO] DISTRIBUTED(1): over\n", "RuntimeError: Launch failed"),
    (TRACEBACK.format("KeyError: 1") + "\nDuring handling of the above exception, another exception occurred:\n\n"
     + TRACEBACK.format("ValueError: 2"), "ValueError: 2"),
    (TRACEBACK.format("KeyError: 1") + "going on\nCheckpointError: step-7 is damaged: say --resume none\n",
     "CheckpointError: step-7 is damaged: say --resume none"),
    ("Fatal Python error: Segmentation fault\n\nThread 0x1:\n  File x\n", "Fatal Python error: Segmentation fault"),
    ("\r 10%|# | 1/10\rDataError: row 3\n", "DataError: row 3"),
    ("WARNING: an Error: of no kind\nerror: x\n", ""),
    (TRACEBACK.format("ValueError: " + "x" * 1000), "ValueError: " + "x" * 388 + " ..."),
])
def test_last_exception(tmp_path, text, expected):
    (tmp_path / "log").write_text("OSError: of an earlier job\n" + text)
    assert last_exception(tmp_path / "log", len("OSError: of an earlier job\n")) == expected


def test_a_large_log(tmp_path):
    (tmp_path / "log").write_text("KeyError: long ago\n" + "x" * 10**6 + "\n" + TRACEBACK.format("ValueError: boom"))
    assert last_exception(tmp_path / "log") == "ValueError: boom"
    (tmp_path / "log").write_bytes(b"\xff\xfe\n" + b"ValueError: \xff\n")
    assert last_exception(tmp_path / "log") == "ValueError: �"


def test_last_place(tmp_path):
    log = tmp_path / "log"
    log.write_text("nothing\n")
    assert last_place(log) is None
    log.write_text("Fatal Python error: Aborted\n\n"
                   'Thread 0x7f (most recent call first):\n  File "/a/x.py", line 1 in w\n\n'
                   'Current thread 0x7e (most recent call first):\n  File "/a/b.py", line 12 in wait\n'
                   '  File "/a/c.py", line 3 in main\n')
    assert str(last_place(log)) == "b.py:12 in wait" and last_place(log).file == "/a/b.py"
    log.write_text(log.read_text().replace("Current thread", "Thread"))  # when a thread of C++ took the signal
    assert str(last_place(log)) == "b.py:12 in wait"
