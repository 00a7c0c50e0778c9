"""What every worker process begins with."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait

from rsd.output import warn_in_one_line


def begin_worker() -> None:
    """It ends with its parent, even by SIGKILL: nothing goes on computing, or waits, for nobody."""
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    warn_in_one_line()
