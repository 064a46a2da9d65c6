"""Bodies of 4 KiB and more are compressed by the producer and unpacked by the consumer; nobody else need care.

python examples/compress.py [namesrv]
"""

import asyncio
import sys

import kitemq

NAMESRV = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876"
BODY = b"the same line again\n" * 5000


async def main() -> None:
    async with kitemq.Producer(NAMESRV, group="reports", compression=kitemq.Compression.ZLIB) as producer:
        await producer.send(kitemq.Message("reports", BODY))
    async with kitemq.PullConsumer(NAMESRV, group="readers", from_where=kitemq.Position.FIRST) as consumer:
        await consumer.subscribe("reports")
        (message,) = await consumer.poll()
        print(f"{len(message.body)} bytes, stored as {len(message.raw.body)}")
        assert message.body == BODY


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except kitemq.BrokerUnavailableError as error:
        sys.exit(error.message)
    except KeyboardInterrupt:
        sys.exit(130)
