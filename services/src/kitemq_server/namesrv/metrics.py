"""What a namesrv shows to Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kitemq_server.namesrv.service import NamesrvService


class NamesrvCollector(Collector):
    """Reads the service when it is scraped."""

    def __init__(self, service: NamesrvService) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Called in the endpoint's thread."""
        service = self._service
        brokers = GaugeMetricFamily("kitemq_namesrv_brokers", "Brokers that are registered.", labels=["cluster"])
        for cluster, count in Counter(service.table.cluster_names()).items():
            brokers.add_metric([cluster], count)
        yield brokers
        yield GaugeMetricFamily("kitemq_namesrv_topics", "Topics with a route.", value=service.table.topic_count)
        yield GaugeMetricFamily(
            "kitemq_namesrv_route_watchers", "Route watch streams that are open.", value=service.feed.watcher_count
        )
        yield CounterMetricFamily(
            "kitemq_namesrv_registrations", "Full registrations taken.", value=service.registration_count
        )
        yield CounterMetricFamily(
            "kitemq_namesrv_expired_brokers", "Brokers taken out for their silence.", value=service.expired_count
        )
