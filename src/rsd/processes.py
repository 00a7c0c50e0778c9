"""What every worker process begins with."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import threading
from multiprocessing.connection import wait

from rsd.output import warn_in_one_line

# mallopt's M_MMAP_MAX and M_TRIM_THRESHOLD: what is freed stays with the process. Otherwise the next scene and its
# drawing context, 0.8 GB, take fresh pages of the kernel: 0.4 s of 1.8, or 2 s where it has few at hand.
KEEP_MEMORY = {-4: 0, -1: 2**31 - 1}


def begin_worker() -> None:
    """It ends with its parent, even by SIGKILL: nothing goes on computing, or waits, for nobody."""
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    warn_in_one_line()
    with contextlib.suppress(AttributeError, OSError):  # glibc alone has it
        for option, value in KEEP_MEMORY.items():
            ctypes.CDLL(None).mallopt(option, value)
