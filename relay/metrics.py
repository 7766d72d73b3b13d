"""Counters, gauges and latency histograms of one side, for Prometheus and for `medferry status`.

Each side has its own registry and its own port; nothing is shared across the link. Latencies are kept as HDR
histograms (1 µs to 10 min, three digits), exported as Prometheus summaries. Labels are lane, side and fixed
words; never an address, a UID or anything of a patient.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate

from hdrh.histogram import HdrHistogram
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import SummaryMetricFamily

LOWEST_US = 1
HIGHEST_US = 600_000_000
"""Microseconds: longer latencies count as ten minutes."""

MAX_SCOPES = 64
"""Streams whose latencies are kept: more than run at once. A histogram takes 170 KB, and a publisher may come
back under ever new names, so beyond that the one longest known is forgotten."""

QUANTILES = (0.5, 0.95, 0.99, 1.0)


class Latency:
    """One HDR histogram of a duration. `record_ns` costs about a microsecond."""

    def __init__(self) -> None:
        self._histogram = HdrHistogram(LOWEST_US, HIGHEST_US, 3)
        self.count = 0
        self.sum_seconds = 0.0
        self._known_at = -1
        self._known: dict[float, float] = {}

    def record_ns(self, nanoseconds: int) -> None:
        """Add one duration. A negative one (clocks of two machines) counts as the lowest."""
        self._histogram.record_value(min(max(nanoseconds // 1000, LOWEST_US), HIGHEST_US))
        self.count += 1
        self.sum_seconds += max(nanoseconds, 0) / 1e9

    def quantile_ms(self, quantile: float) -> float:
        """Milliseconds at `quantile`, one of `QUANTILES`; 0.0 while empty."""
        if not self.count:
            return 0.0
        if self._known_at != self.count:
            self._known = self._quantiles()
            self._known_at = self.count
        return self._known[quantile]

    def _quantiles(self) -> dict[float, float]:
        """All of `QUANTILES` in one pass over the buckets in use, and that in C.

        The library's own pass walks all buckets below the highest in Python. At six hops a stream that held
        up the loop, and the picture on its way, for 4 ms a second.
        """
        kept = self._histogram
        first, last = map(kept.get_counts_array_index, (kept.min_value, kept.max_value))
        totals = list(accumulate(kept.counts[first : last + 1]))
        found = {}
        for quantile in QUANTILES:
            at = bisect_left(totals, kept.get_target_count_at_percentile(quantile * 100))
            value = kept.get_highest_equivalent_value(kept.get_value_from_index(first + at))
            found[quantile] = value / 1000
        return found

    def summary(self) -> dict[str, float]:
        """p50, p95, p99 and max in milliseconds, and the count, for status and reports."""
        names = ("p50_ms", "p95_ms", "p99_ms", "max_ms")
        figures = {name: round(self.quantile_ms(q), 3) for name, q in zip(names, QUANTILES, strict=True)}
        return {**figures, "count": self.count}

    def tally(self) -> dict[str, float]:
        """Count and sum: cheap, and two of them give the mean of the time between."""
        return {"count": self.count, "sum_ms": round(self.sum_seconds * 1000, 3)}


class Metrics:
    """The registry of one side of one lane."""

    def __init__(self, lane: str, side: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"lane": lane, "side": side}
        self._latencies: dict[tuple[str, str], Latency] = {}
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._series: dict[tuple[str, ...], Counter] = {}
        """A counter's series by its name and the values of its own labels: looking one up in the library
        costs ten times as much as adding to it."""
        self.registry.register(self)

    def count(self, name: str, documentation: str, amount: float = 1, **labels: str) -> None:
        """Add to the counter ``medferry_<name>_total``. Labels take fixed words only, always in one order."""
        key = (name, *labels.values())
        series = self._series.get(key)
        if series is None:
            counter = self._counters.get(name)
            if counter is None:
                counter = self._counters[name] = Counter(
                    f"medferry_{name}", documentation, ["lane", "side", *labels], registry=self.registry
                )
            series = self._series[key] = counter.labels(**self._labels, **labels)
        series.inc(amount)

    def gauge(self, name: str, documentation: str, value: float, **labels: str) -> None:
        """Set the gauge ``medferry_<name>``."""
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = self._gauges[name] = Gauge(
                f"medferry_{name}", documentation, ["lane", "side", *labels], registry=self.registry
            )
        gauge.labels(**self._labels, **labels).set(value)

    def latency(self, hop: str, scope: str = "") -> Latency:
        """The histogram of `hop` (``receive``, ``link``, ``total``, …), within `scope` (a stream's name)."""
        key = (hop, scope)
        found = self._latencies.get(key)
        if found is None:
            self._make_room(scope)
            found = self._latencies[key] = Latency()
        return found

    def _make_room(self, scope: str) -> None:
        scopes = dict.fromkeys(where for _, where in self._latencies)
        if scope in scopes or len(scopes) < MAX_SCOPES:
            return
        oldest = next(iter(scopes))
        self._latencies = {key: item for key, item in self._latencies.items() if key[1] != oldest}

    def latencies(self, scope: str = "") -> dict[str, dict[str, float]]:
        """All summaries of one scope, by hop."""
        return {hop: item.summary() for (hop, where), item in self._latencies.items() if where == scope}

    def tallies(self, scope: str = "") -> dict[str, dict[str, float]]:
        """All tallies of one scope, by hop."""
        return {hop: item.tally() for (hop, where), item in self._latencies.items() if where == scope}

    def collect(self) -> Iterator[SummaryMetricFamily]:
        """Prometheus' collector protocol: the histograms as one summary family."""
        names = ["lane", "side", "hop", "scope", "quantile"]
        family = SummaryMetricFamily("medferry_latency_seconds", "Latency by hop", labels=names[:-1])
        for (hop, scope), item in list(self._latencies.items()):
            labels = [self._labels["lane"], self._labels["side"], hop, scope]
            family.add_metric(labels, count_value=item.count, sum_value=item.sum_seconds)
            for quantile in QUANTILES:
                sample = dict(zip(names, [*labels, str(quantile)], strict=True))
                family.add_sample("medferry_latency_seconds", sample, item.quantile_ms(quantile) / 1000)
        yield family

    def describe(self) -> Iterable[SummaryMetricFamily]:
        """No families are known before the first figure."""
        return []

    def exposition(self) -> bytes:
        """The whole registry in Prometheus' text format."""
        return generate_latest(self.registry)
