"""Records refuse what is out of their limits, whoever makes them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay import records as r
from relay.errors import RecordError
from tests.relay.samples import ID, KINDS, SHA256, picture

AUDIO = r.AudioFrame(
    stream="a",
    epoch=0,
    seq=0,
    captured_ns=0,
    decoded_ns=0,
    media_ns=0,
    rate=48000,
    channels=2,
    samples=b"abcd",
)
START = r.ObjectStart(
    id=ID,
    sop_class="1.2.840.10008.5.1.4.1.1.7",
    sop_instance="1.2.3",
    transfer_syntax="1.2.840.10008.1.2.1",
    size=1,
    received_ns=0,
    parsed_ns=0,
)
PART = r.ObjectPart(id=ID, offset=0, data=b"x")
STARTED = r.StreamStarted(stream="s", kind=r.StreamKind.VIDEO, epoch=0)
STOPPED = r.StreamStopped(stream="s", kind=r.StreamKind.AUDIO, epoch=0, reason=r.StopReason.LOST, frames=0)

REFUSED: list[tuple[r.Record, dict[str, Any]]] = [
    *((picture(), {"stream": name}) for name in ("", "A", "-a", "a-", "a b", "a" * 33, "ä", "a\n", "../x")),
    (picture(), {"epoch": -1}),
    (picture(), {"epoch": 2**32}),
    (picture(), {"seq": 2**63}),
    (picture(), {"seq": True}),
    (picture(), {"seq": 1.0}),
    (picture(), {"captured_ns": -1}),
    (picture(), {"width": 15}),
    (picture(), {"width": 4097}),
    (picture(), {"height": 0}),
    (picture(), {"height": 50}),
    (picture(), {"refreshed": 1}),
    (picture(), {"format": "nv12"}),
    (picture(), {"planes": (b"", b"", b"")}),
    (AUDIO, {"rate": 44100}),
    (AUDIO, {"channels": 3}),
    (AUDIO, {"samples": b""}),
    (AUDIO, {"samples": b"abc"}),
    (AUDIO, {"samples": bytes(4 * (r.MAX_AUDIO_SAMPLES + 1))}),
    *(
        (START, {"sop_instance": uid})
        for uid in ("", "1", "1.02", "1.a", "1..2", "1." + "2" * 63, "1.2\n", "../1.2")
    ),
    (START, {"id": ID.upper()}),
    (START, {"id": ID + "0"}),
    (START, {"size": 0}),
    (START, {"size": r.MAX_OBJECT_BYTES + 1}),
    (START, {"grade": 0}),
    (START, {"grade": 6}),
    (PART, {"data": b""}),
    (PART, {"data": bytes(r.MAX_PART_BYTES + 1)}),
    (PART, {"offset": -1}),
    (r.ObjectEnd(id=ID, sha256=SHA256), {"sha256": "0" * 63}),
    (STARTED, {"kind": 1}),
    (STARTED, {"frame_rate_milli": 240_001}),
    (STOPPED, {"reason": 9}),
    (r.Heartbeat(sent_ns=0), {"sent_ns": 2**63}),
    (r.ManifestEntry(id=ID, size=1, sha256=SHA256), {"size": 0}),  # type: ignore[list-item]
    (
        r.Manifest(entries=()),
        {"entries": (r.ManifestEntry(id=ID, size=1, sha256=SHA256),) * (r.MAX_MANIFEST_ENTRIES + 1)},
    ),
]


@pytest.mark.parametrize(("good", "change"), REFUSED)
def test_one_field_out_of_its_limits_is_refused(good: r.Record, change: dict[str, Any]) -> None:
    with pytest.raises(RecordError):
        dataclasses.replace(good, **change)


@given(st.one_of(*KINDS.values()))
@settings(max_examples=30, deadline=None)
def test_a_record_cannot_be_changed(record: r.Record) -> None:
    name = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, name, getattr(record, name))
    assert not hasattr(record, "__dict__")


@given(st.one_of(*KINDS.values()))
@settings(max_examples=30, deadline=None)
def test_no_field_could_hold_an_address_or_free_text(record: r.Record) -> None:
    """Every text of a record is of hex digits, a UID or a stream name."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, str) and value != "yuv420p":
            assert r.is_uid(value) or r.is_stream_name(value) or set(value) <= set("0123456789abcdef")


def test_a_record_does_not_show_what_it_carries() -> None:
    secret = b"DOE^JANE" * 576
    frame = dataclasses.replace(picture(), planes=(secret[:3072], secret[:768], secret[:768]))
    part = dataclasses.replace(PART, data=secret)
    sound = dataclasses.replace(AUDIO, samples=secret)
    for record in (frame, part, sound):
        assert "DOE" not in repr(record)


@pytest.mark.parametrize(
    ("width", "height", "planes"),
    [(16, 16, (256, 64, 64)), (17, 17, (289, 81, 81)), (1280, 720, (921600, 230400, 230400))],
)
def test_chroma_rounds_up(width: int, height: int, planes: tuple[int, int, int]) -> None:
    assert r.plane_sizes(width, height) == planes
