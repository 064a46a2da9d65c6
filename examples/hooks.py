"""Your own code around every send and every handler: for traces, metrics, or a header on every message.

python examples/hooks.py [namesrv]
"""

import asyncio
import sys
import time
import uuid

import kitemq

NAMESRV = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876"


class TraceSends(kitemq.SendHook):
    """Puts a trace id on every message."""

    def before_send(self, message: kitemq.Message) -> kitemq.Message:
        message.properties = {**message.properties, "trace": uuid.uuid4().hex[:8]}
        return message

    def after_send(
        self, message: kitemq.Message, receipt: kitemq.SendReceipt | None, error: BaseException | None
    ) -> None:
        print(f"sent with a trace: {'trace' in message.properties}, {receipt.status.name if receipt else error}")


class TimeHandlers(kitemq.ConsumeHook):
    """Says how old a message is when its handler begins."""

    def before_consume(self, message: kitemq.ReceivedMessage) -> None:
        age_s = time.time() - message.born_timestamp_ms / 1000
        print(f"handled with a trace: {'trace' in message.properties}, {'young' if age_s < 60 else 'old'}")


async def main() -> None:
    async with kitemq.Producer(NAMESRV, group="shop", hooks=[TraceSends()]) as producer:
        await producer.send(kitemq.Message("traced", b"hello"))

    async with kitemq.PushConsumer(
        NAMESRV, group="tracers", from_where=kitemq.Position.FIRST, hooks=[TimeHandlers()]
    ) as consumer:

        async def handle(message: kitemq.ReceivedMessage) -> None:
            consumer.stop()

        await consumer.subscribe("traced", handle)
        await consumer.run()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except kitemq.BrokerUnavailableError as error:
        sys.exit(error.message)
    except KeyboardInterrupt:
        sys.exit(130)
