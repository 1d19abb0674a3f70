"""Signals that stop a run: handled at once, or remembered while something has to be finished first."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from etherdiff.system.errors import Stopped

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK") if hasattr(signal, name))
"""Signals that stop a run, those that this system has: SLURM sends SIGUSR1 before a job's time is up; SIGBREAK is Windows'."""


class _Signals:
    received: int | None = None
    deferring: bool = False


@contextmanager
def stop_signals() -> Iterator[None]:
    """Raise Stopped at the first of `STOPPING`; a SIGINT after it ends the process at once. Main thread only."""
    _Signals.received, _Signals.deferring = None, False
    before = {number: signal.signal(number, _handle) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _Signals.received, _Signals.deferring = None, False


@contextmanager
def deferred() -> Iterator[None]:
    """Raise nothing at a signal: ask `received` whether one came."""
    before, _Signals.deferring = _Signals.deferring, True
    try:
        yield
    finally:
        _Signals.deferring = before


@contextmanager
def at_once() -> Iterator[None]:
    """Raise Stopped in a part of a `deferred` block that may be cut short, also for a signal that came before it."""
    before, _Signals.deferring = _Signals.deferring, False
    try:
        if _Signals.received is not None:
            raise Stopped(_Signals.received)
        yield
    finally:
        _Signals.deferring = before


def received() -> int | None:
    """Return the first signal that came, if any."""
    return _Signals.received


def _handle(number: int, _: object) -> None:
    if _Signals.received is None:
        _Signals.received = number
        if not _Signals.deferring:
            raise Stopped(number)
    elif number == signal.SIGINT:
        os._exit(128 + number)
