"""From results to verdicts: the table of targets as data, one row a target, and the plots.

Pure but for `plot`, which writes a picture. A row that was not measured says so; it never passes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

Results = dict[str, Any]
"""What a benchmark wrote as JSON."""

Verdict = Literal["goal", "target", "missed", "not measured"]

COLOURS = {
    "medferry": "#0b6e99",
    "direct": "#6b6b6b",
    "orthanc": "#c46a2b",
    "orthanc-nodelay": "#e3b07f",
    "pynetdicom": "#7a9a3a",
}
"""One colour a way, in every plot the same."""

VERDICT_STYLES = {"goal": "bold green", "target": "green", "missed": "bold red", "not measured": "dim"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One target: what was measured against what is wanted.

    `measured` is None where it was not. `at_most` turns the comparison around (latency, memory).
    """

    name: str
    measured: float | None
    target: float
    goal: float
    unit: str = "×"
    at_most: bool = False

    @property
    def verdict(self) -> Verdict:
        """Which of the two bounds holds."""
        if self.measured is None:
            return "not measured"
        if self._reaches(self.goal):
            return "goal"
        return "target" if self._reaches(self.target) else "missed"

    def _reaches(self, bound: float) -> bool:
        assert self.measured is not None
        return self.measured <= bound if self.at_most else self.measured >= bound

    def as_json(self) -> dict[str, Any]:
        """The row with its verdict, for the JSON file."""
        return {**asdict(self), "verdict": self.verdict}


ORDINARY = {"associations": 1, "nodelay": True, "stock_receiver": False}
"""What a transfer is where nothing else is asked for: one association, and no end that stalls."""


def _transfers(results: Results, **wanted: Any) -> list[dict[str, Any]]:
    """The transfers that did not fail and whose plan has all of `wanted`."""
    return [
        item
        for item in results.get("transfers", [])
        if not item["failure"] and all(item["plan"][key] == value for key, value in wanted.items())
    ]


def median_rate(results: Results, way: str, set_: str, **plan: Any) -> float | None:
    """Median objects a second over the repeats; None where nothing was measured."""
    found = _transfers(results, way=way, set=set_, **{**ORDINARY, **plan})
    return statistics.median(item["objects"] / item["seconds"] for item in found) if found else None


def ratio(results: Results, set_: str, against: str, **plan: Any) -> float | None:
    """medferry's median rate over that of another way, under the same plan."""
    ours = median_rate(results, "medferry", set_, **plan)
    theirs = median_rate(results, against, set_, **plan)
    return None if ours is None or theirs is None else ours / theirs


def _sets(results: Results) -> list[str]:
    return list(dict.fromkeys(item["plan"]["set"] for item in results.get("transfers", [])))


def _lowest(figures: Iterable[float | None]) -> float | None:
    return min((figure for figure in figures if figure is not None), default=None)


def _scaling(results: Results) -> float | None:
    """Four associations over one, in the worst of the sets."""
    return _lowest(
        four / one
        for set_ in _sets(results)
        if (one := median_rate(results, "medferry", set_))
        and (four := median_rate(results, "medferry", set_, associations=4))
    )


def _slowest(results: Results) -> float | None:
    """The slowest of four associations over their mean: median of the repeats, in the worst of the sets."""
    shares = []
    for set_ in _sets(results):
        found = _transfers(results, way="medferry", set=set_, **{**ORDINARY, "associations": 4})
        if found:
            shares.append(statistics.median(item["slowest_share"] for item in found))
    return _lowest(shares)


def _at(results: Results, *keys: str) -> float | None:
    """The figure below `keys`; None where any of them is missing."""
    found: Any = results
    for key in keys:
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return float(found)


def _memory(results: Results) -> float | None:
    """Megabytes of the largest of medferry's processes, in any transfer."""
    peaks = [
        process["peak_bytes"] for item in _transfers(results, way="medferry") for process in item["processes"]
    ]
    return max(peaks) / 1e6 if peaks else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One line of the table of targets: how to read it from results, and its two bounds."""

    name: str
    read: Callable[[Results], float | None]
    target: float
    goal: float
    unit: str = "×"
    at_most: bool = False


def _against(set_: str, way: str, **plan: Any) -> Callable[[Results], float | None]:
    return lambda results: ratio(results, set_, way, **plan)


def _relayed(set_: str, way: str) -> Callable[[Results], float | None]:
    """Against another relay, into DCMTK's storescp as it comes: what users who compare would see."""
    return _against(set_, way, stock_receiver=True)


def _figure(*keys: str) -> Callable[[Results], float | None]:
    return lambda results: _at(results, *keys)


def _idle_share(results: Results) -> float | None:
    share = _at(results, "idle", "medferry", "share_of_a_core")
    return None if share is None else share * 100


_LATENCY = ("latency", "medferry", "custody_to_delivered")

DICOM_TARGETS: tuple[Target, ...] = (
    Target(name="CT 0.5 MB / direct", read=_against("ct", "direct"), target=0.3, goal=0.6),
    Target(name="small 10 KB / direct", read=_against("small", "direct"), target=0.25, goal=0.5),
    Target(name="multi-frame 268 MB / direct", read=_against("large", "direct"), target=0.4, goal=0.8),
    Target(
        name="small 10 KB / direct, stock senders",
        read=_against("small", "direct", nodelay=False),
        target=20,
        goal=50,
    ),
    Target(name="small / Orthanc forwarding", read=_relayed("small", "orthanc"), target=10, goal=30),
    Target(name="CT / Orthanc forwarding", read=_relayed("ct", "orthanc"), target=10, goal=30),
    Target(name="small / pynetdicom relay", read=_relayed("small", "pynetdicom"), target=10, goal=30),
    Target(name="CT / pynetdicom relay", read=_relayed("ct", "pynetdicom"), target=10, goal=30),
    Target(name="multi-frame / Orthanc forwarding", read=_relayed("large", "orthanc"), target=1.5, goal=3),
    Target(name="four associations / one (worst set)", read=_scaling, target=1.0, goal=1.5),
    Target(name="slowest of four / their mean (worst set)", read=_slowest, target=0.7, goal=0.9),
    Target(
        name="one CT, custody to delivered, p50",
        read=_figure(*_LATENCY, "p50_ms"),
        target=5,
        goal=2,
        unit="ms",
        at_most=True,
    ),
    Target(
        name="one CT, custody to delivered, p99",
        read=_figure(*_LATENCY, "p99_ms"),
        target=15,
        goal=6,
        unit="ms",
        at_most=True,
    ),
    Target(
        name="C-ECHO round trip, p50",
        read=_figure("echo", "medferry", "p50_ms"),
        target=0.5,
        goal=0.2,
        unit="ms",
        at_most=True,
    ),
    Target(
        name="64 idle associations, CPU", read=_idle_share, target=0.5, goal=0.1, unit="% core", at_most=True
    ),
    Target(name="memory of the largest process", read=_memory, target=250, goal=120, unit="MB", at_most=True),
)
"""The targets of DICOM speed. "No measurable CPU" is read as half a percent of a core; the goal, a tenth."""


def rows(results: Results, targets: Sequence[Target] = DICOM_TARGETS) -> list[Row]:
    """Every target with what was measured, in the table's order."""
    return [
        Row(
            name=target.name,
            measured=target.read(results),
            target=target.target,
            goal=target.goal,
            unit=target.unit,
            at_most=target.at_most,
        )
        for target in targets
    ]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def table(found: Sequence[Row], title: str) -> Table:
    """The rows for a terminal."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("what")
    for column in ("measured", "target", "goal"):
        shown.add_column(column, justify="right")
    shown.add_column("verdict")
    for row in found:
        sign = "≤" if row.at_most else "≥"
        style = VERDICT_STYLES[row.verdict]
        shown.add_row(
            row.name,
            "-" if row.measured is None else f"{_number(row.measured)} {row.unit}",
            f"{sign} {_number(row.target)} {row.unit}",
            f"{sign} {_number(row.goal)} {row.unit}",
            f"[{style}]{row.verdict}[/]",
        )
    return shown


def rates_table(results: Results) -> Table:
    """Median objects and megabytes a second of every plan that was run, and what failed."""
    shown = Table(title="Rates (medians)", title_justify="left")
    for column in ("set", "associations", "senders", "receiver", "way"):
        shown.add_column(column)
    for column in ("objects/s", "MB/s", "to direct", "CPU s/GB", "rewritten"):
        shown.add_column(column, justify="right")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for item in results.get("transfers", []):
        plan = item["plan"]
        key = (plan["set"], plan["associations"], plan["nodelay"], plan["stock_receiver"], plan["way"])
        groups.setdefault(key, []).append(item)
    for (set_, associations, nodelay, stock_receiver, way), items in groups.items():
        ends = ["TCP_NODELAY" if nodelay else "stock", "stock" if stock_receiver else "TCP_NODELAY"]
        labels = [set_, str(associations), *ends, way]
        plan = {"associations": associations, "nodelay": nodelay, "stock_receiver": stock_receiver}
        rate = median_rate(results, way, set_, **plan)
        if rate is None:
            shown.add_row(*labels, f"[bold red]failed: {items[0]['failure'][:60]}[/]")
            continue
        direct = median_rate(results, "direct", set_, **plan)
        whole = [item for item in items if not item["failure"]]
        bytes_each = whole[0]["bytes"] / whole[0]["objects"]
        cpu = statistics.median(
            sum(process["cpu_seconds"] for process in item["processes"]) / item["bytes"] for item in whole
        )
        changed = max(item["objects"] - item["identical"] for item in whole)
        failed = len(items) - len(whole)
        shown.add_row(
            *labels,
            f"{rate:,.1f}" + (f" [bold red]({failed} failed)[/]" if failed else ""),
            f"{rate * bytes_each / 1e6:,.1f}",
            "-" if direct is None else f"{rate / direct:.3g} ×",
            f"{cpu * 1e9:.1f}",
            str(changed),
        )
    return shown


CURVES = {
    "size": ("bytes of one object", "seconds an object", "seconds_each"),
    "associations": ("associations at once", "CT a second, in all", "rate"),
    "contexts": ("presentation contexts proposed", "small objects a second", "rate"),
    "waiting": ("objects waiting in the spool", "objects a second", "rate_out"),
}
"""Growth curves: name to x label, y label, and the figure drawn."""


def plot(results: Results, path: Path) -> None:
    """Bars of ratios and growth curves, as one picture."""
    import matplotlib  # not needed where only the table is

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {name: points for name, points in results.get("curves", {}).items() if points}
    below = (len(curves) + 1) // 2
    figure = pyplot.figure(figsize=(12, 4.5 + 3.6 * below), layout="constrained")
    grid = figure.add_gridspec(1 + below, 2, height_ratios=[1.3] + [1.0] * below)
    _bars(figure.add_subplot(grid[0, 0]), results)
    _margins(figure.add_subplot(grid[0, 1]), rows(results))
    for number, (name, points) in enumerate(curves.items()):
        _curve(figure.add_subplot(grid[1 + number // 2, number % 2]), name, points)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(axes: Any, results: Results) -> None:
    """Rates as a share of direct, by set, one association, senders without a stall. Logarithmic."""
    sets = _sets(results)
    ways = list(dict.fromkeys(item["plan"]["way"] for item in results.get("transfers", [])))
    ways = [way for way in ways if way != "direct"]
    width = 0.8 / max(len(ways), 1)
    for number, way in enumerate(ways):
        for at, set_ in enumerate(sets):
            rate, base = median_rate(results, way, set_), median_rate(results, "direct", set_)
            if rate is None or base is None:
                continue
            bar = axes.bar(
                at + (number - (len(ways) - 1) / 2) * width,
                rate / base,
                width * 0.92,
                color=COLOURS.get(way, "#999999"),
                label=way if at == 0 else None,
            )
            axes.bar_label(bar, [_number(rate / base)], fontsize=8, padding=2)
    axes.axhline(1.0, color=COLOURS["direct"], linewidth=1, linestyle="--")
    axes.text(0.995, 1.0, "direct", transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
    axes.set_yscale("log")
    axes.set_ylim(top=8)
    axes.set_xticks(range(len(sets)), sets)
    axes.set_title("Rate as a share of no relay at all (one association)", loc="left", fontsize=11)
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=4)
    axes.spines[["top", "right"]].set_visible(False)


def _margins(axes: Any, found: Sequence[Row]) -> None:
    """How far each target is exceeded: 1 is the target itself, to the right is better."""
    measured = [row for row in reversed(found) if row.measured]
    for at, row in enumerate(measured):
        assert row.measured is not None
        margin = row.target / row.measured if row.at_most else row.measured / row.target
        goal = row.target / row.goal if row.at_most else row.goal / row.target
        colour = {"goal": "#2e7d32", "target": "#7cb342", "missed": "#c62828"}[row.verdict]
        axes.barh(at, margin, 0.62, color=colour)
        axes.plot([goal, goal], [at - 0.36, at + 0.36], color="black", linewidth=1.4)
        axes.text(margin * 1.05, at, f"{_number(row.measured)} {row.unit}", va="center", fontsize=7.5)
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlim(right=max(axes.get_xlim()[1] * 3, 10))
    axes.set_yticks(range(len(measured)), [row.name for row in measured], fontsize=8)
    axes.set_title("Margin over each target (dashed: target, tick: goal)", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(axes: Any, name: str, points: Sequence[dict[str, Any]]) -> None:
    x_label, y_label, figure = CURVES[name]
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for point in points:
        if point.get("failure"):
            continue
        series.setdefault((point["way"], ""), []).append((point["x"], point[figure]))
        if name == "waiting":
            series.setdefault((point["way"], "in"), []).append((point["x"], point["rate_in"]))
    for (way, kind), line in series.items():
        label = {"": way if name != "waiting" else "delivered", "in": "accepted"}[kind]
        style = {"": "-o", "in": "--s"}[kind]
        axes.plot(
            *zip(*sorted(line), strict=True), style, color=COLOURS.get(way, "#999999"), label=label, ms=4
        )
    axes.set_xscale("log", base=2 if name in ("associations", "contexts") else 10)
    if name == "size":
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
    if name in ("associations", "contexts"):
        ticks = sorted({point["x"] for point in points})
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    if series:
        axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
