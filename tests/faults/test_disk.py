"""Brokers whose disk is full, broken or stuck, seen by their clients."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc.aio
import pytest

import kitemq
from kitemq import Message, MessageQueue, Producer, PullConsumer, StoreFullError
from kitemq.errors import error_from_rpc
from kitemq.proto.v1 import broker_pb2, broker_pb2_grpc, message_pb2
from kitemq.rpc import CHANNEL_OPTIONS
from tests.cluster import Cluster, running_cluster
from tests.crash.crash_disk import CrashDisk
from tests.faults.processes import ServiceProcess
from tests.waiting import eventually

MIB = 1024 * 1024
TOPIC = "orders"
TURNS = 50


class Broker:
    """What a client can ask of one broker, without anything that the SDK adds."""

    def __init__(self, channel: grpc.aio.Channel, address: str) -> None:
        self._stub = broker_pb2_grpc.BrokerStub(channel)
        self._address = address

    async def send(self, body: bytes) -> broker_pb2.SendMessageResponse:
        """One try. Raises the table's error."""
        message = message_pb2.Message(topic=TOPIC, body=body, message_id=os.urandom(16).hex())
        request = broker_pb2.SendMessageRequest(message=message, queue_id=0, default_topic_queue_count=1)
        try:
            return await self._stub.SendMessage(request, timeout=20)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, address=self._address) from None

    async def pull(self, queue_offset: int) -> broker_pb2.PullMessageResponse:
        """One message."""
        request = broker_pb2.PullMessageRequest(
            topic=TOPIC, queue_id=0, group="readers", queue_offset=queue_offset, max_count=1
        )
        return await self._stub.PullMessage(request, timeout=20)

    async def heartbeat(self) -> None:
        """As of a producer."""
        await self._stub.Heartbeat(broker_pb2.HeartbeatRequest(client_id="c", producer_groups=["p"]), timeout=20)

    async def commit(self, queue_offset: int, *, durable: bool) -> None:
        """An offset of the group "readers"."""
        offset = message_pb2.GroupOffset(group="readers", topic=TOPIC, queue_id=0, queue_offset=queue_offset)
        request = broker_pb2.CommitOffsetsRequest(client_id="c", offsets=[offset], durable=durable)
        await self._stub.CommitOffsets(request, timeout=20)

    async def committed(self) -> int:
        """Of the group "readers"."""
        response = await self._stub.GetOffsets(broker_pb2.GetOffsetsRequest(group="readers"), timeout=20)
        return int(response.offsets[0].queue_offset)


@asynccontextmanager
async def asking(address: str) -> AsyncIterator[Broker]:
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        yield Broker(channel, address)


async def check_a_full_disk(
    namesrv: str, address: str, fill: Callable[[], None], free: Callable[[], None], *, broker_name: str
) -> None:
    """Sends are refused in words that help; all else goes on; sends go on by themselves when there is space."""
    body = b"x" * 256 * 1024
    async with asking(address) as broker, Producer(namesrv, group="shop", delivery_timeout_s=60.0) as producer:
        sent = 0
        for _ in range(8):
            await broker.send(body)
            sent += 1
        fill()
        refusal: StoreFullError | None = None
        while refusal is None:
            assert sent < 2000, "the disk is never full"
            try:
                await broker.send(body)
                sent += 1
            except StoreFullError as error:
                refusal = error
        assert re.search(rf"broker {broker_name} has no disk space left: \d+ bytes are free", refusal.message)
        assert "/" not in refusal.message
        assert refusal.retry_after_ms > 0
        await broker.heartbeat()
        for queue_offset in (0, sent - 1):
            reply = await broker.pull(queue_offset)
            assert reply.max_offset == sent
            assert reply.records[0].body == body
        await broker.commit(3, durable=True)
        await broker.commit(5, durable=False)
        assert await broker.committed() == 5
        with pytest.raises(StoreFullError):
            await broker.send(body)
        waiting = asyncio.create_task(producer.send(Message(TOPIC, b"patient")))
        with pytest.raises(kitemq.KiteMQError):
            await producer.send(Message(TOPIC, b"hasty"), timeout_s=1.0)
        assert not waiting.done()
        free()
        receipt = await waiting
        assert receipt.queue_offset == sent
        await broker.send(body)
        reply = await broker.pull(sent)
        assert (reply.records[0].body, reply.max_offset) == (b"patient", sent + 2)


async def test_a_full_disk(tmp_path: Path) -> None:
    disk = CrashDisk(tmp_path / "broker-a")

    def fill() -> None:
        disk.capacity_bytes = disk.used_bytes() + 2 * MIB

    def free() -> None:
        disk.capacity_bytes = 0

    async with running_cluster(tmp_path, disk=disk, segment_bytes=16 * MIB) as cluster:
        await check_a_full_disk(cluster.namesrv_address, cluster.broker.address, fill, free, broker_name="broker-a")


@contextmanager
def small_file_system(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A tmpfs of this size. Skips the test where that is not allowed."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.processes
async def test_a_full_file_system(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small", 192 * MIB) as folder:
        namesrv = ServiceProcess("namesrv", tmp_path / "namesrv")
        settings = ("--segment-bytes", "16MiB", "--disk-watermark-percent", "99")
        broker = ServiceProcess(
            "broker", folder / "broker", "--namesrv", namesrv.address, "--broker-name", "broker-a", *settings
        )
        ballast = folder / "ballast"

        def fill() -> None:
            with ballast.open("wb") as file:
                status = os.statvfs(folder)
                os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - MIB)

        try:
            await namesrv.start()
            await broker.start()
            await check_a_full_disk(namesrv.address, broker.address, fill, ballast.unlink, broker_name="broker-a")
            assert str(folder) in broker.log_path.read_text(), "the operator is told where"
        finally:
            assert await broker.stop() == 0
            assert await namesrv.stop() == 0


@pytest.mark.processes
@pytest.mark.parametrize("flush_mode", ["SYNC_FLUSH", "ASYNC_FLUSH"])
async def test_a_failed_fsync_ends_the_broker(tmp_path: Path, flush_mode: str) -> None:
    """It stops serving with a code that is not 0, acknowledges nothing on that fsync, and recovers when it starts."""
    sign = tmp_path / "the disk is gone"
    namesrv = ServiceProcess("namesrv", tmp_path / "namesrv")
    broker = ServiceProcess(
        "broker",
        tmp_path / "broker",
        *("--namesrv", namesrv.address, "--broker-name", "broker-a", "--flush-mode", flush_mode),
        module="tests.faults.faulty_server",
        environment={"FAILING_DISK": str(sign)},
    )
    acknowledged: dict[str, int] = {}
    stop = asyncio.Event()

    async def produce() -> None:
        async with Producer(namesrv.address, group="shop", delivery_timeout_s=60.0) as producer:
            number = 0
            while not stop.is_set():
                queue = MessageQueue(TOPIC, "broker-a", 0)
                receipt = await producer.send(Message(TOPIC, b"%d" % number), queue=queue)
                acknowledged[str(number)] = receipt.queue_offset
                number += 1

    try:
        await namesrv.start()
        await broker.start()
        producing = asyncio.create_task(produce())
        await eventually(lambda: len(acknowledged) > 100)
        sign.touch()
        assert await broker.exited() == 1
        assert "store failed" in broker.log_path.read_text()
        before = len(acknowledged)
        sign.unlink()
        await broker.start()
        await eventually(lambda: len(acknowledged) > before + 100)
        stop.set()
        await producing
        async with PullConsumer(namesrv.address, group="readers", auto_commit=False) as reader:
            await reader.assign([MessageQueue(TOPIC, "broker-a", 0)])
            await reader.seek(MessageQueue(TOPIC, "broker-a", 0), 0)
            stored: list[str] = []
            while len(stored) < len(acknowledged):
                messages = await reader.poll(1000, timeout_s=20.0)
                assert messages
                stored += [message.body.decode() for message in messages]
        assert stored == [str(number) for number in range(len(acknowledged))]
        assert acknowledged == {body: offset for offset, body in enumerate(stored)}
    finally:
        stop.set()
        await broker.stop()
        await namesrv.stop()


@pytest.mark.parametrize("flush_mode", ["SYNC_FLUSH", "ASYNC_FLUSH"])
async def test_a_stuck_disk_stops_nothing_but_what_needs_it(tmp_path: Path, flush_mode: str) -> None:
    """While an fsync hangs: heartbeats, pulls of what is confirmed, and commits are answered as ever."""
    disk = CrashDisk(tmp_path / "broker-a")
    async with running_cluster(tmp_path, disk=disk, flush_mode=flush_mode, flush_timeout_ms=60_000) as cluster:
        await check_a_stuck_disk(cluster, disk, sync=flush_mode == "SYNC_FLUSH")


async def check_a_stuck_disk(cluster: Cluster, disk: CrashDisk, *, sync: bool) -> None:
    stalls = []
    async with asking(cluster.broker.address) as broker:
        for number in range(TURNS):
            await broker.send(b"%d" % number)
        try:
            stalls.append(disk.faults.stall("sync"))
            first = asyncio.create_task(broker.send(b"stuck"))
            assert await asyncio.to_thread(stalls[0].entered.wait, 20)
            # Once the fsync is known to hang, writes are left to the store's thread. They hang there as well.
            await eventually(cluster.broker.store._writer._deferred)
            stalls.append(disk.faults.stall("write"))
            others = [asyncio.create_task(broker.send(b"stuck too")) for _ in range(10)]
            for number in range(TURNS):
                await broker.heartbeat()
                assert (await broker.pull(number)).records[0].body == b"%d" % number
                await broker.commit(number, durable=False)
                assert await broker.committed() == number
            assert first.done() is not sync
            assert not any(send.done() for send in others)
        finally:
            for stall in stalls:
                stall.release()
        replies = await asyncio.gather(first, *others)
        assert sorted(reply.queue_offset for reply in replies) == list(range(TURNS, TURNS + 11))
