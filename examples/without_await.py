"""The same names in a program without an event loop. Every object may be used from several threads.

python examples/without_await.py [namesrv]
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import kitemq
import kitemq.sync

NAMESRV = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876"


def main() -> None:
    # In this order: a producer that closes ends the sends that the threads wait for.
    with ThreadPoolExecutor(8) as threads, kitemq.sync.Producer(NAMESRV, group="shop") as producer:
        receipts = threads.map(lambda number: producer.send(kitemq.Message("simple", b"%d" % number)), range(100))
        print(f"{len(list(receipts))} sent from 8 threads")

    with kitemq.sync.PullConsumer(NAMESRV, group="simple", from_where=kitemq.Position.FIRST) as consumer:
        consumer.subscribe("simple")
        count = 0
        for message in consumer:
            count += len(message.body) > 0
            if count == 100:
                break
        print(f"{count} read")


if __name__ == "__main__":
    try:
        main()
    except kitemq.BrokerUnavailableError as error:
        sys.exit(error.message)
    except KeyboardInterrupt:
        sys.exit(130)
