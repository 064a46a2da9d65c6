"""Who is calling, and by which way in: what a handler may ask about the call it serves."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Identity:
    """An authenticated caller. Everyone is anonymous until users and rights exist."""

    name: str


ANONYMOUS = Identity("anonymous")


@dataclass(frozen=True, slots=True)
class Call:
    """listener: name of the listener that the call came in by."""

    listener: str
    identity: Identity


_current: ContextVar[Call] = ContextVar("kitemq_call")


def current_call() -> Call:
    """The call that this task serves. Only inside a handler."""
    return _current.get()


def enter_call(call: Call) -> None:
    """Make `call` the current one of this task; the interceptor's, for the task of one RPC."""
    _current.set(call)
