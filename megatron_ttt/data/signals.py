"""How SIGINT and SIGTERM end a command: in one line, with 128 plus their number, and at once."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE_SECONDS = 10.0
"""What an orderly end may take, a disk that hangs included."""
_SEND_AGAIN_SECONDS = 0.01
"""Long enough for the callback that dropped an interrupt to return."""


def exit_on_signals() -> None:
    """From now on, end this process at the first SIGINT or SIGTERM.

    Nothing is put in order: this is for the time before there is anything to put in order. A module
    that is being imported could take an exception for one of its own.
    """
    for each in _SIGNALS:
        signal.signal(each, lambda number, _: _exit(number))


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """End the work in an orderly way on SIGINT and SIGTERM: what is published stays.

    Raises `KeyboardInterrupt` within, and `SystemExit` behind. Python drops an exception that is
    raised in a destructor or a weak reference's callback: the signal is then sent again. Where the
    work does not end all the same (a disk can hang), the process does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    told: SimpleQueue[_Signalled | None] = SimpleQueue()
    threading.Thread(target=_exit_in_the_end, args=(told,), daemon=True).start()

    def stop(number: int, _frame: object) -> None:
        if not received:
            received.append(number)
            told.put(_Signalled(number))
            # Native code that is waiting (Ray's) knows this exception, and raises one of its own.
            raise KeyboardInterrupt

    def dropped(unraisable: "sys.UnraisableHookArgs") -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt) and received:
            told.put(_Signalled(received[0], dropped=True))
            received.clear()
        else:
            report_dropped(unraisable)

    before = {each: signal.getsignal(each) for each in _SIGNALS}
    report_dropped, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        try:
            for each in _SIGNALS:
                signal.signal(each, stop)
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
    except KeyboardInterrupt:
        number = received[0] if received else signal.SIGINT
        _say(number)
        raise SystemExit(128 + number) from None
    finally:
        sys.unraisablehook = report_dropped
        told.put(None)


class _Signalled(NamedTuple):
    number: int
    dropped: bool = False


def _exit_in_the_end(told: "SimpleQueue[_Signalled | None]") -> None:
    """Wait for a signal or the end of the work (None); after a signal, give the work some time."""
    signalled = told.get()
    deadline = time.monotonic() + _GRACE_SECONDS
    while signalled is not None:
        if signalled.dropped:
            time.sleep(_SEND_AGAIN_SECONDS)
            os.kill(os.getpid(), signalled.number)
        try:
            last, signalled = signalled, told.get(timeout=max(0, deadline - time.monotonic()))
        except Empty:
            _exit(last.number)


def _say(number: int) -> None:
    # Not print(), which may be at work when a signal comes.
    message = f"stopped by {signal.Signals(number).name}; the same command goes on from here\n"
    with suppress(OSError):
        os.write(2, message.encode())


def _exit(number: int) -> None:
    _say(number)
    os._exit(128 + number)
