"""Thousands of sends in flight: messages that wait at the same time travel together, so this is the fast way.

python examples/many_sends.py [namesrv]
"""

import asyncio
import sys
import time

import kitemq

NAMESRV = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876"
COUNT = 10_000


async def main() -> None:
    async with kitemq.Producer(NAMESRV, group="sensors") as producer:
        began = time.perf_counter()
        # Memory is bounded: `send` waits while buffer_bytes_max (64 MiB) is under way.
        receipts = await asyncio.gather(
            *(producer.send(kitemq.Message("readings", b"%d" % number)) for number in range(COUNT))
        )
        print(f"{len(receipts)} messages, {COUNT / (time.perf_counter() - began):,.0f} a second")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except kitemq.BrokerUnavailableError as error:
        sys.exit(error.message)
    except KeyboardInterrupt:
        sys.exit(130)
