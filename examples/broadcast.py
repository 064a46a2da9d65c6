"""Broadcasting: every member of the group gets every message.

python examples/broadcast.py [namesrv]
"""

import asyncio
import sys

import kitemq

NAMESRV = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876"


async def listen(name: str) -> None:
    """Print three prices and stop. With a client_id its offsets would outlive it, in ~/.kitemq/offsets."""
    async with kitemq.PullConsumer(
        NAMESRV,
        group="screens",
        message_model=kitemq.MessageModel.BROADCASTING,
        from_where=kitemq.Position.FIRST,
    ) as consumer:
        await consumer.subscribe("prices")
        prices: list[str] = []
        async for message in consumer:
            prices.append(message.body.decode())
            if len(prices) == 3:
                break
    print(f"{name}: {' '.join(sorted(prices))}")


async def main() -> None:
    async with kitemq.Producer(NAMESRV, group="market") as producer:
        for price in ("101", "102", "103"):
            await producer.send(kitemq.Message("prices", price.encode()))
    await asyncio.gather(listen("left screen"), listen("right screen"))


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except kitemq.BrokerUnavailableError as error:
        sys.exit(error.message)
    except KeyboardInterrupt:
        sys.exit(130)
