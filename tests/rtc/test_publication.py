"""Admission and payment of a source's streams, with pictures as decoders give them and a clock by hand."""

from __future__ import annotations

import pytest

from relay.errors import PeerError
from relay.mailbox import Mailbox
from relay.metrics import Metrics
from relay.records import StopReason, VideoFrame, plane_sizes
from rtc.budget import PixelBudget
from rtc.decode_thread import DecodedPicture
from rtc.depayload import Size
from rtc.publication import DECODE_SLACK, Publication, Stage

SMALL = Size(width=320, height=240)
LARGE = Size(width=640, height=480)
START = 10**9


class Counted(Mailbox):
    """A mailbox that counts the pictures of each stream."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: dict[str, int] = {}

    def put(self, record: object) -> bool:
        if isinstance(record, VideoFrame):
            self.pictures[record.stream] = self.pictures.get(record.stream, 0) + 1
        return True


def stage(pixels_per_second: int, max_frame_rate: float = 240) -> tuple[Stage, dict[str, int]]:
    mailbox = Counted()
    made = Stage(
        mailbox=mailbox,
        metrics=Metrics("camera", "source"),
        epoch=1,
        max_streams=4,
        max_frame_rate=max_frame_rate,
        budget=PixelBudget(pixels_per_second, max_frame_rate),
    )
    return made, mailbox.pictures


def show(publication: Publication, size: Size, arrival_ns: int) -> None:
    luma, u, v = plane_sizes(size.width, size.height)
    planes = (bytes(luma), bytes(u), bytes(v))
    publication.picture(DecodedPicture(size.width, size.height, planes, 0, arrival_ns, arrival_ns), START)


def test_a_greedy_stream_takes_nothing_from_a_modest_one() -> None:
    made, crossed = stage(2 * 30 * 320 * 240)
    streams = {30: made.open("modest"), 240: made.open("greedy")}
    arrivals = sorted((START + index * 10**9 // rate, rate) for rate in streams for index in range(10 * rate))
    for arrival_ns, rate in arrivals:
        show(streams[rate], SMALL, arrival_ns)
    assert crossed["modest"] == 300
    assert 300 <= crossed["greedy"] < 400
    assert streams[30].status()["over_budget"] == 0
    assert streams[240].status()["over_budget"] == 2400 - crossed["greedy"]
    counted = f'media_over_budget_total{{lane="camera",side="source"}} {2400.0 - crossed["greedy"]}'
    assert counted in made.metrics.exposition().decode()


def test_a_first_picture_that_nobody_asked_about_is_checked(caplog: pytest.LogCaptureFixture) -> None:
    made, crossed = stage(31 * 320 * 240)
    publication = made.open("camera")
    show(publication, LARGE, START)
    show(publication, Size(width=8, height=8), START)
    assert crossed == {}
    assert publication.faults == {"budget": 1, "size": 1}
    assert not publication.live
    show(publication, SMALL, START)
    assert crossed == {"camera": 1}
    assert "640x480" in caplog.text


def test_one_stream_over_the_budget_is_refused_and_told_so() -> None:
    made, crossed = stage(30 * 320 * 240)
    first, second = made.open("first"), made.open("second")
    first.admit(SMALL)
    with pytest.raises(PeerError, match="budget"):
        second.admit(SMALL)
    for index in range(60):
        show(first, SMALL, START + index * 33_333_333)
        show(second, SMALL, START + index * 33_333_333)
    assert crossed == {"first": 60}
    assert second.faults == {"budget": 60}
    with pytest.raises(PeerError, match="all of the decoding budget"):
        made.open("third")
    first.stop(StopReason.ENDED)
    second.admit(SMALL)
    with pytest.raises(PeerError, match="budget"):
        first.admit(SMALL)


def test_what_comes_far_too_fast_is_not_even_decoded() -> None:
    made, _ = stage(10**9, max_frame_rate=30)
    publication = made.open("camera")
    refused = 0
    for index in range(2400):
        try:
            publication.pace(START + index * 10**9 // 240)
        except PeerError as error:
            refused += 1
            assert error.reason == "rate"
    assert 2400 - refused == pytest.approx(DECODE_SLACK * 30 * 10, rel=0.1)


def test_the_log_and_the_metric_agree(caplog: pytest.LogCaptureFixture) -> None:
    made, _ = stage(10**9)
    publication = made.open("camera")
    for index in range(95):
        publication.fault("decode", "damaged")
        if index == 50:
            made.tell_faults()
    publication.stop(StopReason.ENDED)
    fields = [record.__dict__ for record in caplog.records]
    told = sum(item["count"] for item in fields if item.get("event") == "media_fault")
    assert told == publication.faults["decode"] == 95
    assert b'reason="decode",side="source"} 95.0' in made.metrics.exposition()
    assert len(fields) < 20
