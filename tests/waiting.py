"""Waiting for a condition, never for a time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any


async def eventually(condition: Callable[[], Any], *, timeout_s: float = 20.0) -> Any:
    """Wait until `condition()` (plain or async) is true and return what it gave. Fails after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"not true within {timeout_s} s: {inspect.getsource(condition).strip()}"
        await asyncio.sleep(0.005)
