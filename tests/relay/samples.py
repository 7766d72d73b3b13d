"""Records of every kind, made up, for the tests of the core."""

from __future__ import annotations

from hypothesis import strategies as st

from relay import records as r

KEY = bytes(range(32))
OTHER_KEY = bytes(32)
LANE = 7
ID = "0123456789abcdef" * 2
SHA256 = "ab" * 32

ids = st.binary(min_size=16, max_size=16).map(bytes.hex)
hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)
epochs = st.integers(0, 2**32 - 1)
counts = st.integers(0, 2**63 - 1)
streams = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", fullmatch=True)
uids = st.from_regex(r"(0|[1-9][0-9]{0,8})(\.(0|[1-9][0-9]{0,8})){1,6}", fullmatch=True)
sizes = st.integers(1, r.MAX_OBJECT_BYTES)


@st.composite
def _video(draw: st.DrawFn) -> r.VideoFrame:
    width, height = draw(st.integers(16, 40)), draw(st.integers(16, 40))
    y, u, v = (bytes([draw(st.integers(0, 255))]) * size for size in r.plane_sizes(width, height))
    return r.VideoFrame(
        stream=draw(streams),
        epoch=draw(epochs),
        seq=draw(counts),
        captured_ns=draw(counts),
        decoded_ns=draw(counts),
        media_ns=draw(counts),
        width=width,
        height=height,
        planes=(y, u, v),
        refreshed=draw(st.booleans()),
    )


@st.composite
def _audio(draw: st.DrawFn) -> r.AudioFrame:
    channels = draw(st.sampled_from([1, 2]))
    return r.AudioFrame(
        stream=draw(streams),
        epoch=draw(epochs),
        seq=draw(counts),
        captured_ns=draw(counts),
        decoded_ns=draw(counts),
        media_ns=draw(counts),
        rate=draw(st.sampled_from([8000, 12000, 16000, 24000, 48000])),
        channels=channels,
        samples=bytes(2 * channels * draw(st.integers(1, r.MAX_AUDIO_SAMPLES))),
    )


KINDS: dict[type[r.Record], st.SearchStrategy[r.Record]] = {
    r.VideoFrame: _video(),
    r.AudioFrame: _audio(),
    r.ObjectStart: st.builds(
        r.ObjectStart,
        id=ids,
        sop_class=uids,
        sop_instance=uids,
        transfer_syntax=uids,
        size=sizes,
        received_ns=counts,
        parsed_ns=counts,
        grade=st.integers(1, 5),
    ),
    r.ObjectPart: st.builds(
        r.ObjectPart,
        id=ids,
        offset=st.integers(0, r.MAX_OBJECT_BYTES),
        data=st.binary(min_size=1, max_size=300),
    ),
    r.ObjectEnd: st.builds(r.ObjectEnd, id=ids, sha256=hashes),
    r.StreamStarted: st.builds(
        r.StreamStarted,
        stream=streams,
        kind=st.sampled_from(r.StreamKind),
        epoch=epochs,
        frame_rate_milli=st.integers(0, 240_000),
    ),
    r.StreamStopped: st.builds(
        r.StreamStopped,
        stream=streams,
        kind=st.sampled_from(r.StreamKind),
        epoch=epochs,
        reason=st.sampled_from(r.StopReason),
        frames=counts,
    ),
    r.Heartbeat: st.builds(r.Heartbeat, sent_ns=counts),
    r.Manifest: st.builds(
        r.Manifest,
        entries=st.lists(st.builds(r.ManifestEntry, id=ids, size=sizes, sha256=hashes), max_size=5).map(
            tuple
        ),
    ),
}
"""A strategy for each kind of record."""


def picture(width: int = 64, height: int = 48, seq: int = 0) -> r.VideoFrame:
    """A picture whose bytes tell its planes apart."""
    y, u, v = r.plane_sizes(width, height)
    return r.VideoFrame(
        stream="camera-1",
        epoch=1,
        seq=seq,
        captured_ns=1,
        decoded_ns=2,
        media_ns=3,
        width=width,
        height=height,
        planes=(bytes([seq % 256]) * y, b"u" * u, b"v" * v),
    )


def part(number: int, size: int = 64) -> r.ObjectPart:
    """A part that carries its number."""
    return r.ObjectPart(id=ID, offset=number, data=number.to_bytes(8, "big").ljust(size, b"."))


def end(number: int) -> r.ObjectEnd:
    """An object's end whose id is a number."""
    return r.ObjectEnd(id=f"{number:032x}", sha256=SHA256)
