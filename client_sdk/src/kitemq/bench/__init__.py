"""Measuring KiteMQ, a part of the product: `kitemq bench`.

    histogram.py   latencies, counted as they happen
    producing.py   load on the sending side: closed loops and fixed rates
    consuming.py   load on the receiving side: drains, and the time from born to handler
    holding.py     many clients with a connection each, all of which wait
    live.py        load on a cluster of the user's, and its report: a line a second, then the whole

`kitemq bench suite` and `growth` start servers and load generators of their own, all of them processes:

    process.py     processes that always end, readiness, orders to workers
    worker.py      a load generator's process
    cluster.py     namesrv and broker
    procfs.py      what a process costs
    baselines.py   bare gRPC and a bare disk: what figures are held against
    rows.py        figure, baseline, bar, verdict
    harness.py     one run: rounds of baselines and cases, interleaved
    suite.py       the cases of `kitemq bench suite`
    growth.py      the cases of `kitemq bench growth`: big logs, many queues, many clients
"""
