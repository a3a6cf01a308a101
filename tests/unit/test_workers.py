"""Worker processes of the data pipeline: what they do when they are interrupted."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os, signal, threading, time
from multiprocessing import forkserver
from lapis.data import workers

threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # a library's thread, which takes signals
connect = forkserver.connect_to_new_process

def connect_and_interrupt(fds):
    new = connect(fds)
    os.kill(os.getpid(), signal.SIGINT)  # the worker is there, and waits to be told what it is
    time.sleep(0.05)
    return new

forkserver.connect_to_new_process = connect_and_interrupt
try:
    list(workers.run_tasks(abs, [-1, -2], 2))
except KeyboardInterrupt:
    print("interrupted", flush=True)
    os._exit(130)  # as the command line ends
"""


def test_a_worker_that_is_being_started_is_not_torn_by_an_interrupt() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "interrupted\n", "")
