"""`medferry bench dicom`, `bench rtp` and `bench webrtc`: measure a running relay from outside.

Objects of their own go in on side A and are known by their SOP instance on side B; pictures carry a
machine-readable stamp of when they were painted, which is read off those that come out. Needs both sides
within reach of one machine, so that one clock serves both.
"""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.parse
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from relay.config import split_address
from relay.exits import failing_clearly
from relay.lanes import load

bench = typer.Typer(help="Measure a running relay from outside, end to end.", no_args_is_help=True)

MAX_ASSOCIATIONS = 64
"""Of one benchmark. A lane takes 32 from one address unless it is told otherwise."""

Seconds = Annotated[float, typer.Option(min=3, max=3600, help="How long.")]
Codec = Annotated[str, typer.Option(help="h264 or vp8.")]
Dimensions = Annotated[str, typer.Option("--size", help="Width x height, as in 1280x720.")]
Rate = Annotated[int, typer.Option(min=1, max=120, help="Pictures a second.")]
Bitrate = Annotated[int, typer.Option(min=100_000, max=50_000_000, help="Bits a second sent.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts, every latency included.")]
Plot = Annotated[str | None, typer.Option(help="Write a plot to this file (needs matplotlib).")]


def _address(text: str) -> str:
    try:
        split_address(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def _url(text: str) -> str:
    try:
        url = urllib.parse.urlsplit(text)
        possible = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        possible = False
    if not possible:
        raise typer.BadParameter(f"{text!r} is no URL: write one as in http://host:8081/whip/camera")
    return text


def _size(text: str, rate: int) -> Any:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise typer.BadParameter("write width x height, as in 1280x720", param_hint="--size")
    return load("rtc.camera:Size")(int(width), int(height), rate)


def _measure(name: str, as_json: bool, plot: str | None, **options: Any) -> None:
    if options["codec"] not in ("h264", "vp8"):
        raise typer.BadParameter("write h264 or vp8", param_hint="--codec")
    with failing_clearly():
        report = asyncio.run(load(f"rtc.bench:bench_{name}")(load("rtc.bench:Options")(**options)))
    if plot is not None:
        load("rtc.bench_report:plot")([report], plot)
    _show(name, report, load("rtc.bench_report:lines"), as_json)


def _show(name: str, report: Any, lines: Callable[[Any], list[tuple[str, str]]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.as_json()))
        return
    table = Table("figure", name)
    for label, value in lines(report):
        table.add_row(label, value)
    Console().print(table)


@bench.command("dicom")
def dicom(
    source: Annotated[str, typer.Argument(callback=_address, help="host:port of the lane's source.")],
    sink: Annotated[
        str, typer.Argument(callback=_address, help="host:port of its destination, which must be free.")
    ],
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="How long objects are sent.")] = 10,
    side: Annotated[int, typer.Option(min=8, max=16_384, help="Rows and columns of 16 bits each.")] = 512,
    associations: Annotated[int, typer.Option(min=1, max=MAX_ASSOCIATIONS, help="So many at once.")] = 1,
    calling: Annotated[str, typer.Option(help="AE title of the sender.")] = "BENCH",
    called: Annotated[str, typer.Option(help="AE title of the lane's source.")] = "MEDFERRY",
    receiver: Annotated[str, typer.Option(help="AE title of the destination.")] = "PACS",
    as_json: Json = False,
) -> None:
    """Store objects into a DICOM lane and receive what it delivers, in its destination's place.

    The destination itself must not listen meanwhile, and nobody else use the lane. Objects that are missing
    in the end are still in the lane's custody, for the destination; see medferry spool.
    """
    # That our ends close in the end, and whom they turn away, is told by the figures.
    logging.getLogger("dicom").setLevel(logging.ERROR)
    options = load("dicom.bench:Options")(
        source=source,
        sink=sink,
        seconds=seconds,
        side=side,
        associations=associations,
        calling_ae_title=calling,
        called_ae_title=called,
        receiver_ae_title=receiver,
    )
    with failing_clearly():
        report = asyncio.run(load("dicom.bench:bench_dicom")(options))
    _show("dicom", report, load("dicom.bench:lines"), as_json)


@bench.command("rtp")
def rtp(
    source: Annotated[str, typer.Argument(callback=_address, help="host:port where the relay takes RTP.")],
    sink: Annotated[str, typer.Argument(callback=_address, help="host:port that the relay sends RTP to.")],
    seconds: Seconds = 10,
    codec: Codec = "h264",
    size: Dimensions = "1280x720",
    rate: Rate = 30,
    bitrate: Bitrate = 4_000_000,
    as_json: Json = False,
    plot: Plot = None,
) -> None:
    """Send plain RTP into a relay and receive what it sends."""
    options = {"source": source, "sink": sink, "seconds": seconds, "codec": codec, "bitrate": bitrate}
    _measure("rtp", as_json, plot, size=_size(size, rate), **options)


@bench.command("webrtc")
def webrtc(
    source: Annotated[
        str, typer.Argument(callback=_url, help="URL to publish to, as in http://host:8081/whip/camera.")
    ],
    sink: Annotated[
        str, typer.Argument(callback=_url, help="URL to watch, as in http://host:8082/whep/camera.")
    ],
    seconds: Seconds = 10,
    codec: Codec = "h264",
    size: Dimensions = "1280x720",
    rate: Rate = 30,
    bitrate: Bitrate = 4_000_000,
    source_token: Annotated[str | None, typer.Option(envvar="MEDFERRY_SOURCE_TOKEN")] = None,
    sink_token: Annotated[str | None, typer.Option(envvar="MEDFERRY_SINK_TOKEN")] = None,
    as_json: Json = False,
    plot: Plot = None,
) -> None:
    """Publish by WHIP and watch by WHEP."""
    options = {"source": source, "sink": sink, "seconds": seconds, "codec": codec, "bitrate": bitrate}
    tokens = {"source_token": source_token, "sink_token": sink_token}
    _measure("webrtc", as_json, plot, size=_size(size, rate), **options, **tokens)
