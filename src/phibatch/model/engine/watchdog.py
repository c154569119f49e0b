"""Ending a process that hangs, even in native code that never gives Python a turn."""

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

_seconds = 0.0


@contextmanager
def watch(seconds: float) -> Iterator[None]:
    """End the process, with its stacks on stderr, if the block goes so long without a `step`; 0 is never.

    faulthandler's timer is a thread of the C library's own: it fires while another thread holds the GIL.
    """
    global _seconds  # noqa: PLW0603 - the timer is the process's
    _seconds = seconds
    step()
    try:
        yield
    finally:
        _seconds = 0.0
        faulthandler.cancel_dump_traceback_later()


def step() -> None:
    """Show that the process goes on."""
    if _seconds:
        faulthandler.dump_traceback_later(_seconds, exit=True)
