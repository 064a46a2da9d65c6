"""A plain function may be a handler: it runs in a thread, so it may block without holding up anything else.

python examples/blocking_handler.py [namesrv]
"""

import asyncio
import sys
import threading
import time

import kitemq

NAMESRV = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876"
COUNT = 20


async def main() -> None:
    async with kitemq.Producer(NAMESRV, group="shop") as producer:
        await producer.send_batch([kitemq.Message("thumbnails", b"%d" % number) for number in range(COUNT)])

    threads: list[str] = []
    async with kitemq.PushConsumer(
        NAMESRV, group="painters", from_where=kitemq.Position.FIRST, concurrency=10
    ) as consumer:
        loop = asyncio.get_running_loop()

        def handle(message: kitemq.ReceivedMessage) -> None:
            time.sleep(0.1)  # a database, a file, a library without async
            threads.append(threading.current_thread().name)
            if len(threads) == COUNT:
                loop.call_soon_threadsafe(consumer.stop)

        await consumer.subscribe("thumbnails", handle)
        await consumer.run()
    print(f"{COUNT} messages in {len(set(threads))} threads")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except kitemq.BrokerUnavailableError as error:
        sys.exit(error.message)
    except KeyboardInterrupt:
        sys.exit(130)
