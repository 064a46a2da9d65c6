"""Messages with one sharding key go to one queue, and stay in the order in which they were sent.

python examples/send_in_order.py [namesrv]
"""

import asyncio
import sys

import kitemq

NAMESRV = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876"
STEPS = ["created", "paid", "packed", "sent"]


async def main() -> None:
    async with kitemq.Producer(NAMESRV, group="shop") as producer:
        sends = [
            producer.send(kitemq.Message("order-steps", f"{order} {step}".encode()), sharding_key=order)
            for step in STEPS
            for order in ("order-1", "order-2", "order-3")
        ]
        await asyncio.gather(*sends)

    steps: dict[str, list[str]] = {}
    async with kitemq.PullConsumer(NAMESRV, group="in-order", from_where=kitemq.Position.FIRST) as consumer:
        await consumer.subscribe("order-steps")
        async for message in consumer:
            order, step = message.body.decode().split()
            steps.setdefault(order, []).append(step)
            if sum(map(len, steps.values())) == len(sends):
                break
    for order, seen in sorted(steps.items()):
        print(f"{order}: {' '.join(seen)}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except kitemq.BrokerUnavailableError as error:
        sys.exit(error.message)
    except KeyboardInterrupt:
        sys.exit(130)
