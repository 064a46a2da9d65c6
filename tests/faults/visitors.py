"""Many clients of one broker in a process that can be killed: connections that end without a goodbye.

    python -m tests.faults.visitors ADDRESS COUNT FIRST_NUMBER [greedy]

Every client has a connection of its own, with a heartbeat, a Notify stream, a Pull stream that holds pulls, a Send
stream in the middle of its work, and a unary pull; the greedy ones ask for much that they never read. Prints "ready"
when all are there, and waits.
"""

from __future__ import annotations

import asyncio
import sys

from kitemq.proto.v1 import broker_pb2
from tests.broker.wire import Client, batch, numbered

TOPIC = "visited"
BIG_TOPIC = "big"


async def visit(address: str, number: int, *, greedy: bool) -> Client:
    """One client, with everything under way."""
    client = Client(address, ("grpc.use_local_subchannel_pool", 1))
    client_id = f"visitor-{number}"
    consumer = broker_pb2.ConsumerInfo(
        group=f"group-{number % 10}", subscriptions=[broker_pb2.Subscription(topic=TOPIC, filter="*")]
    )
    await client.broker.Heartbeat(
        broker_pb2.HeartbeatRequest(client_id=client_id, producer_groups=["visitors"], consumers=[consumer])
    )
    events = client.broker.Notify(broker_pb2.NotifyRequest(client_id=client_id))
    await events.read()
    send, pull = client.send_stream(), client.pull_stream()
    await send.send(batch(numbered(TOPIC, 1, 2, instance=number + 1), queue_id=0))
    await send.write(batch(numbered(TOPIC, 3, 2, instance=number + 1), queue_id=0))
    for queue_id in (1, 2, 3):
        await pull.open(TOPIC, queue_id)
    if greedy:
        await pull.open(BIG_TOPIC, 0)
    held = client.broker.PullMessage(
        broker_pb2.PullMessageRequest(topic=TOPIC, queue_id=1, group="g", suspend_ms=60_000)
    )
    held.add_done_callback(lambda _call: None)
    return client


async def main(address: str, count: int, first_number: int, *, greedy: bool) -> None:
    """All of them, some at a time."""
    clients = []
    for start in range(0, count, 25):
        numbers = range(first_number + start, first_number + min(start + 25, count))
        clients += await asyncio.gather(*(visit(address, number, greedy=greedy) for number in numbers))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), greedy="greedy" in sys.argv))
