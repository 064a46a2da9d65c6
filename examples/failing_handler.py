"""A handler that raises sees its message again after a while; the others go on meanwhile.

python examples/failing_handler.py [namesrv]
"""

import asyncio
import sys

import kitemq

NAMESRV = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876"


async def main() -> None:
    async with kitemq.Producer(NAMESRV, group="shop") as producer:
        for body in (b"good", b"bad", b"good too"):
            await producer.send(kitemq.Message("jobs", body), sharding_key="one queue")

    async with kitemq.PushConsumer(
        NAMESRV,
        group="workers",
        from_where=kitemq.Position.FIRST,
        retry_backoff_s=[0.2, 0.5, 5.0],  # by attempt; RocketMQ's table by default: 10 s, 30 s, 1 min, …
    ) as consumer:

        async def handle(message: kitemq.ReceivedMessage) -> None:
            text, attempt = message.body.decode(), message.delivery_attempt
            if text == "bad" and attempt < 3:
                print(f"{text}: attempt {attempt} fails")
                raise RuntimeError("not yet")
            print(f"{text}: done at attempt {attempt}")
            if text == "bad":
                consumer.stop()

        await consumer.subscribe("jobs", handle)
        await consumer.run()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except kitemq.BrokerUnavailableError as error:
        sys.exit(error.message)
    except KeyboardInterrupt:
        sys.exit(130)
