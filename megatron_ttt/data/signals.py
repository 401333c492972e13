"""How SIGINT and SIGTERM end a command: in one line, with 128 plus their number, and at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE_SECONDS = 10.0
"""What an orderly end may take, a disk that hangs included."""


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

    Raises `KeyboardInterrupt` within, and `SystemExit` behind. Where the work does not end (an
    exception can get lost in a destructor, a disk can hang), the process does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    told: SimpleQueue[int] = SimpleQueue()
    threading.Thread(target=_exit_in_the_end, args=(told,), daemon=True).start()

    def stop(number: int, _frame: object) -> None:
        if not received:
            received.append(number)
            told.put(number)
            # Native code that is waiting (Ray's) knows this exception, and raises one of its own.
            raise KeyboardInterrupt

    before = {each: signal.getsignal(each) for each in _SIGNALS}
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
        told.put(0)


def _exit_in_the_end(told: SimpleQueue) -> None:
    """Wait for the number of a signal, or 0 for the end of the work; give the first one time."""
    if number := told.get():
        try:
            told.get(timeout=_GRACE_SECONDS)
        except Empty:
            _exit(number)


def _say(number: int) -> None:
    # Not print(), which may be at work when a signal comes.
    message = f"stopped by {signal.Signals(number).name}; the same command goes on from here\n"
    with suppress(OSError):
        os.write(2, message.encode())


def _exit(number: int) -> None:
    _say(number)
    os._exit(128 + number)
