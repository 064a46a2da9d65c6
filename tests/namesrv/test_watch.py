"""The feed of routes: encoded once, nobody waits for a slow watcher, nothing grows."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from kitemq.errors import BrokerBusyError, BrokerUnavailableError
from kitemq_server.namesrv import watch
from kitemq_server.namesrv.watch import RouteFeed
from tests.waiting import eventually


class Encoder:
    """Versions of routes; counts how often each is encoded."""

    def __init__(self) -> None:
        self.version = 0
        self.calls: list[tuple[str, str]] = []

    def __call__(self, topic: str, listener: str) -> bytes:
        self.calls.append((topic, listener))
        return f"{topic}/{listener}/{self.version}".encode()


async def start(feed: RouteFeed, topics: list[str], listener: str, seen: list[bytes]) -> asyncio.Task[None]:
    async def write(data: bytes) -> None:
        seen.append(data)

    return asyncio.create_task(feed.watch(topics, lambda: listener, write))


async def test_a_change_is_encoded_once_for_all_watchers_of_a_listener() -> None:
    encoder = Encoder()
    feed = RouteFeed(encoder)
    seen: list[list[bytes]] = [[] for _ in range(200)]
    tasks = [await start(feed, ["t"], "internal" if i % 2 else "external", seen[i]) for i in range(len(seen))]
    await eventually(lambda: all(len(one) == 1 for one in seen))
    encoder.calls.clear()
    encoder.version = 1
    feed.changed(["t", "unwatched"])
    await eventually(lambda: all(len(one) == 2 for one in seen))
    assert sorted(encoder.calls) == [("t", "external"), ("t", "internal")]
    assert seen[0] == [b"t/external/0", b"t/external/1"]
    assert feed.watcher_count == 200
    feed.stop()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, BrokerUnavailableError) for result in results)
    assert feed.watcher_count == 0


async def test_a_slow_watcher_skips_to_the_newest_and_delays_nobody() -> None:
    encoder = Encoder()
    feed = RouteFeed(encoder)
    gate = asyncio.Event()
    slow: list[bytes] = []
    quick: list[bytes] = []

    async def write_slowly(data: bytes) -> None:
        await gate.wait()
        slow.append(data)

    def reached(count: int) -> bool:
        return len(quick) == count

    tasks = [
        asyncio.create_task(feed.watch(["a", "b"], lambda: "", write_slowly)),
        await start(feed, ["a"], "", quick),
    ]
    await eventually(lambda: len(quick) == 1)
    for version in range(1, 51):
        encoder.version = version
        feed.changed(["a"])
        await eventually(partial(reached, version + 1))
    gate.set()
    await eventually(lambda: len(slow) == 3)
    assert slow == [b"a//0", b"b//50", b"a//50"]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_nothing_is_kept_of_watchers_that_left() -> None:
    feed = RouteFeed(Encoder())
    seen: list[bytes] = []
    task = await start(feed, ["t", "t", "u"], "", seen)
    await eventually(lambda: len(seen) == 2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert feed.watcher_count == 0
    assert not feed._watchers
    assert not feed._encoded


async def test_more_watchers_than_allowed_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "WATCHERS_MAX", 1)
    feed = RouteFeed(Encoder())
    seen: list[bytes] = []
    task = await start(feed, ["t"], "", seen)
    await eventually(lambda: seen)
    with pytest.raises(BrokerBusyError) as refusal:
        await feed.watch(["t"], lambda: "", lambda data: asyncio.sleep(0))
    assert refusal.value.retry_after_ms > 0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
