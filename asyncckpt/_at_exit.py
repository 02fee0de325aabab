"""The exit hook. The first import registers it: none can be registered once the interpreter shuts down."""

from __future__ import annotations

import concurrent.futures.thread as executors  # its hook must be there before ours, to run after it
import sys
import threading


def _finish() -> None:
    # Other training threads may still save, even for the first time; Python waits for them only after this.
    while others := [thread for thread in threading.enumerate() if _is_waited_for(thread)]:
        others[0].join()
    engine = sys.modules.get("asyncckpt._saving.engine")
    if engine is not None:
        engine.finish_at_exit()


def _is_waited_for(thread: threading.Thread) -> bool:
    """Return whether Python waits for a thread; executors stop theirs only after our hook."""
    of_processes = getattr(sys.modules.get("concurrent.futures.process"), "_threads_wakeups", ())
    mine = thread in {threading.current_thread(), threading.main_thread()}
    return not (mine or thread.daemon or thread in executors._threads_queues or thread in of_processes)


threading._register_atexit(_finish)  # type: ignore[attr-defined]
