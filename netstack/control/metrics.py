"""`GET /metrics`: what `GET /v1/status` shows as numbers, for Prometheus (its text format 0.0.4 and OpenMetrics).

Nothing is counted for this: at each scrape the counters that the parts of a network keep anyway are read once. Counters
of all kinds are one family with a label, `netstack_events_total{event="dhcp_offers"}`, because which there are is for
the parts to say; those of DNS are a family of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class StatusSource(Protocol):
    """What has the numbers."""

    def statistics(self) -> Mapping[str, Any]: ...


_DNS = "dns_"


class Metrics:
    """A collector for prometheus-client."""

    def __init__(self, source: StatusSource) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        """Everything, as of now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        state = self._source.statistics()
        yield GaugeMetricFamily("netstack_uptime_seconds", "Seconds since the network was opened", state["uptime"])
        info = GaugeMetricFamily("netstack_info", "Always 1", labels=["version", "subnet", "subnet6"])
        info.add_metric([state["version"], state["network"]["subnet"], state["network"]["subnet6"]], 1)
        yield info
        yield GaugeMetricFamily("netstack_guests", "Guests that are known", len(state["guests"]))
        flows = GaugeMetricFamily("netstack_flows", "Open flows", labels=["protocol"])
        for protocol in ("tcp", "udp", "icmp"):
            flows.add_metric([protocol], state["flows"][protocol])
        yield flows
        yield GaugeMetricFamily("netstack_flows_limit", "TCP flows that may be open", state["flows"]["limit"])
        yield from self._links(state)
        drops = CounterMetricFamily("netstack_drops", "Frames and packets that were dropped", labels=["reason"])
        for reason, count in state["drops"].items():
            drops.add_metric([reason], count)
        yield drops
        events = CounterMetricFamily("netstack_events", "Other things that were counted", labels=["event"])
        names = CounterMetricFamily("netstack_dns", "What happened to DNS queries", labels=["event"])
        for event, count in state["counters"].items():
            if event.startswith((_DNS, "mdns_")):
                names.add_metric([event.removeprefix(_DNS)], count)
            else:
                events.add_metric([event], count)
        yield events
        yield names
        yield from _forwards(state.get("forwards", ()))
        for name, size in state.get("dns", {}).items():
            yield GaugeMetricFamily(f"netstack_dns_{name}", "Size of the DNS service's tables", size)

    def _links(self, state: Mapping[str, Any]) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        connected = GaugeMetricFamily("netstack_link_connected", "Whether a guest is attached", labels=["link"])
        families = {
            key: CounterMetricFamily(f"netstack_link_{key}", words, labels=["link"])
            for key, words in (
                ("frames_from_guest", "Frames that came from guests"),
                ("bytes_from_guest", "Bytes of frames that came from guests"),
                ("frames_to_guest", "Frames that left for guests"),
                ("bytes_to_guest", "Bytes of frames that left for guests"),
                ("drops_to_guest", "Frames for guests that did not fit into the link"),
            )
        }
        for link in state["links"]:
            connected.add_metric([link["name"]], link["connected"])
            for key, family in families.items():
                family.add_metric([link["name"]], link.get(key, 0))
        yield connected
        yield from families.values()


def _forwards(listed: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    """By their SPEC, which does not change while they last."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = ["spec", "owner"]
    is_open = GaugeMetricFamily("netstack_forward_connections", "Open connections of a forward", labels=labels)
    families = {
        "total": CounterMetricFamily("netstack_forward_connections_made", "Connections that came", labels=labels),
        "refused": CounterMetricFamily("netstack_forward_refused", "Of these, what no guest took", labels=labels),
        "bytes_from_guest": CounterMetricFamily("netstack_forward_bytes_from_guest", "Bytes to callers", labels=labels),
        "bytes_to_guest": CounterMetricFamily("netstack_forward_bytes_to_guest", "Bytes of callers", labels=labels),
    }
    for forward in listed:
        values = [forward["spec"], forward["owner"]]
        is_open.add_metric(values, forward["connections"]["open"])
        for key, family in families.items():
            family.add_metric(values, forward[key] if key in forward else forward["connections"][key])
    yield GaugeMetricFamily("netstack_forwards", "Forwards that are open", len(listed))
    yield is_open
    yield from families.values()


def write_metrics(source: StatusSource, accept: str) -> tuple[bytes, str]:
    """The numbers as of now, and their content type: OpenMetrics for who accepts it."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Metrics(source))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
