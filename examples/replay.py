"""Queues assigned by hand, outside of any group's sharing: read again what was stored since some time, or at an offset.

python examples/replay.py [namesrv]
"""

import asyncio
import sys
from datetime import UTC, datetime, timedelta

import kitemq

NAMESRV = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876"


async def main() -> None:
    async with kitemq.Producer(NAMESRV, group="shop") as producer:
        receipts = await producer.send_batch([kitemq.Message("history", b"%d" % number) for number in range(8)])
    queue = receipts[0].queue

    async with kitemq.PullConsumer(NAMESRV, group="replay") as consumer:
        await consumer.assign([queue])
        await consumer.seek(queue, datetime.now(UTC) - timedelta(minutes=10))
        print(f"of the last ten minutes: {len(await consumer.poll())}")
        await consumer.seek(queue, receipts[5].queue_offset)
        print(f"from offset {receipts[5].queue_offset}: {len(await consumer.poll())}")
        await consumer.seek(queue, kitemq.Position.FIRST)
        first = (await consumer.poll(max_count=1))[0]
        print(f"from the first: {first.body.decode()}, then {consumer.position(queue)} follows")
        consumer.pause(queue)
        print(f"paused: {len(await consumer.poll(timeout_s=0.2))}")
        consumer.resume(queue)
        print(f"resumed: {len(await consumer.poll())}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except kitemq.BrokerUnavailableError as error:
        sys.exit(error.message)
    except KeyboardInterrupt:
        sys.exit(130)
