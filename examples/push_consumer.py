"""A handler for every message: return and it is done, raise and it comes again. Tags choose which messages come.

python examples/push_consumer.py [namesrv]
"""

import asyncio
import sys

import kitemq

NAMESRV = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876"


async def main() -> None:
    async with kitemq.Producer(NAMESRV, group="shop") as producer:
        for tag in ("paid", "created", "refunded"):
            await producer.send(kitemq.Message("payments", b"order 7", tag=tag))

    async with kitemq.PushConsumer(NAMESRV, group="billing", from_where=kitemq.Position.FIRST) as consumer:
        seen = []

        async def handle(message: kitemq.ReceivedMessage) -> None:
            print(f"{message.tag}: {message.body.decode()}")
            seen.append(message.tag)
            if len(seen) == 2:
                consumer.stop()  # a service would run until SIGTERM

        await consumer.subscribe("payments", handle, filter="paid || refunded")
        await consumer.run()
    print("offsets are committed, and the group's other members have taken over")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except kitemq.BrokerUnavailableError as error:
        sys.exit(error.message)
    except KeyboardInterrupt:
        sys.exit(130)
