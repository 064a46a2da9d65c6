"""Ask for messages yourself: in a loop that commits as it goes, or in batches that you commit when they are safe.

python examples/pull_consumer.py [namesrv]
"""

import asyncio
import sys

import kitemq

NAMESRV = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876"


async def main() -> None:
    async with kitemq.Producer(NAMESRV, group="shop") as producer:
        await producer.send_batch([kitemq.Message("audit", b"%d" % number) for number in range(10)])

    # A message counts as done when the next one is asked for.
    async with kitemq.PullConsumer(NAMESRV, group="auditors", from_where=kitemq.Position.FIRST) as consumer:
        await consumer.subscribe("audit")
        count = 0
        async for message in consumer:
            count += 1
            if message.body == b"3":
                break
    print(f"read {count} in a loop")

    # The group goes on where it was; nothing is committed before `commit`.
    async with kitemq.PullConsumer(NAMESRV, group="auditors", auto_commit=False) as consumer:
        await consumer.subscribe("audit")
        messages = await consumer.poll(max_count=100, timeout_s=5)
        print(f"polled {', '.join(message.body.decode() for message in messages)}")
        await consumer.commit()
        for queue in consumer.held_queues():
            if offset := await consumer.committed(queue):
                print(f"committed: queue {queue.queue_id} goes on at offset {offset}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except kitemq.BrokerUnavailableError as error:
        sys.exit(error.message)
    except KeyboardInterrupt:
        sys.exit(130)
