"""The fragment codec: what goes in comes out, and nothing else does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay import records as r
from relay import wire
from relay.errors import WireError
from relay.link import Arrival
from tests.relay.samples import ID, KEY, KINDS, LANE, OTHER_KEY, SHA256, end, part, picture


def encoder(**changes: Any) -> wire.Encoder:
    return wire.Encoder(**{"lane": LANE, "key": KEY, "epoch": 1, **changes})


def decoder(**changes: Any) -> wire.Decoder:
    return wire.Decoder(**{"lane": LANE, "key": KEY, **changes})


def encoding(by: wire.Encoder, *records: r.Record, now: int = 5) -> Iterator[bytearray]:
    """Fragments as they are made, each in memory of its own."""
    for fragment in by.encode_into(memoryview(bytearray(wire.MAX_FRAGMENT)), records, lambda: now):
        yield bytearray(fragment)


class Tray:
    """A link with trays, without the link: fragments in, messages of the least possible memory between."""

    def __init__(self) -> None:
        self.source, self.sink = encoder(), decoder()
        self.memory = memoryview(bytearray(wire.MAX_LARGE_FRAGMENT))
        self.sizes: list[int] = []
        """Of the fragments that lay in the tray; 0 for one that did not."""

    def through(self, *records: r.Record) -> list[Arrival]:
        """What arrives of `records`."""
        found = []
        memory = memoryview(bytearray(wire.MAX_FRAGMENT))
        for fragment in self.source.encode_into(memory, records, lambda: 5, self.memory):
            large = len(fragment) > wire.MAX_FRAGMENT
            self.sizes.append(len(fragment) if large else 0)
            message = wire.TICKET.pack(len(fragment)) if large else bytes(fragment)
            room = self.sink.room()[: len(message)]
            room[:] = message
            fragment = self.sink.taken_out(self.memory, room) if large else room
            found += self.sink.decode(fragment, 9, own=large)
        return found


def encode(*records: r.Record, by: wire.Encoder | None = None, now: int = 5) -> list[bytearray]:
    return list(encoding(by or encoder(), *records, now=now))


def decode(fragments: list[bytearray], by: wire.Decoder | None = None) -> list[r.Record]:
    into = by or decoder()
    found = []
    for fragment in fragments:
        for arrival in into.decode(memoryview(fragment), 9):
            found.append(_kept(arrival.record))
    return found


def _kept(record: r.Record) -> r.Record:
    """The record with its buffers copied, since they are valid until the next fragment only."""
    match record:
        case r.VideoFrame():
            y, u, v = (bytes(plane) for plane in record.planes)
            fields = {name: getattr(record, name) for name in record.__slots__ if name != "planes"}
            return r.VideoFrame(**fields, planes=(y, u, v))
        case r.AudioFrame():
            fields = {name: getattr(record, name) for name in record.__slots__ if name != "samples"}
            return r.AudioFrame(**fields, samples=bytes(record.samples))
        case r.ObjectPart():
            return r.ObjectPart(id=record.id, offset=record.offset, data=bytes(record.data))
    return record


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_every_kind_of_record_comes_out_as_it_went_in(kind: type[r.Record], data: st.DataObject) -> None:
    record = data.draw(KINDS[kind])
    assert decode(encode(record)) == [record]


@given(st.lists(st.one_of(*KINDS.values()), max_size=12))
@settings(max_examples=25, deadline=None)
def test_many_records_keep_their_order(records: list[r.Record]) -> None:
    assert decode(encode(*records)) == records


def test_the_table_of_types_and_the_table_of_decoders_are_of_the_same_records() -> None:
    assert set(wire._TYPES) == set(KINDS)
    assert set(wire._TYPES.values()) == set(wire._DECODERS)


def test_small_neighbours_share_a_fragment() -> None:
    assert len(encode(*(part(number) for number in range(100)))) == 1


def test_arrivals_tell_when_they_entered_and_left() -> None:
    (fragment,) = encode(end(1), now=41)
    (arrival,) = decoder().decode(memoryview(fragment), 43)
    assert (arrival.entered_ns, arrival.left_ns) == (41, 43)


@pytest.mark.parametrize("size", [1, r.MAX_PART_BYTES - 1, r.MAX_PART_BYTES])
def test_an_object_of_one_part_is_one_fragment(size: int) -> None:
    uid = "1." + "2" * (r.MAX_UID_CHARS - 2)
    start = r.ObjectStart(
        id=ID,
        sop_class=uid,
        sop_instance=uid,
        transfer_syntax=uid,
        size=size,
        received_ns=1,
        parsed_ns=2,
        grade=1,
    )
    records: list[r.Record] = [start, r.ObjectPart(id=ID, offset=0, data=bytes(size)), end(1)]
    (fragment,) = encode(*records)
    assert len(fragment) <= wire.MAX_FRAGMENT
    assert decode([fragment]) == records


@pytest.mark.parametrize(
    ("width", "height"), [(300, 290), (300, 291), (1280, 720), (1279, 719), (4096, 4096)]
)
def test_a_picture_of_any_size_crosses_in_full_fragments(width: int, height: int) -> None:
    record = picture(width, height)
    fragments = encode(record)
    assert decode(fragments) == [record]
    assert all(len(fragment) == wire.MAX_FRAGMENT for fragment in fragments[:-1])


def test_a_picture_at_the_edge_of_one_fragment() -> None:
    """One byte of payload decides between WHOLE and FIRST, LAST: try every size around it."""
    for height in range(286, 294):
        for width in range(299, 302):
            record = picture(width, height)
            fragments = encode(record)
            assert decode(fragments) == [record]
            assert [fragment[3] for fragment in fragments] in ([wire.WHOLE], [wire.FIRST, wire.LAST])


@pytest.mark.parametrize(
    ("width", "height"), [(300, 290), (300, 300), (1280, 720), (1279, 719), (4096, 4096)]
)
def test_a_picture_of_any_size_crosses_by_tray_in_one_fragment(width: int, height: int) -> None:
    tray, record = Tray(), picture(width, height)
    (arrival,) = tray.through(record)
    assert _kept(arrival.record) == record
    assert (len(tray.sizes), bool(tray.sizes[0])) == (1, sum(map(len, record.planes)) > wire.MAX_PAYLOAD)


def test_what_came_by_tray_stays_when_the_tray_is_written_over() -> None:
    tray = Tray()
    sent = [big(seq) for seq in range(3)]
    arrivals = [tray.through(record)[0] for record in sent]
    tray.memory[:] = bytes(len(tray.memory))
    for record, arrival in zip(sent, arrivals, strict=True):
        assert _kept(arrival.record) == record
        assert arrival.pixels is not None
        assert bytes(arrival.pixels) == b"".join(map(bytes, record.planes))


def test_a_large_record_lies_in_the_tray_alone() -> None:
    tray = Tray()
    records: list[r.Record] = [end(1), part(2), big(3), end(4)]
    arrivals = tray.through(*records)
    assert [_kept(arrival.record) for arrival in arrivals] == records
    assert [bool(size) for size in tray.sizes] == [False, True, False]
    assert [arrival.held for arrival in arrivals] == [True, False, False, False]


HEARTBEATS = b"\x08\0\0\0\x08" + bytes(8)
LARGE = wire.MAX_PAYLOAD // len(HEARTBEATS) + 1
"""So many are more than one message holds."""


@pytest.mark.parametrize(
    ("payload", "shape"),
    [
        (HEARTBEATS * LARGE, wire.WHOLE),
        (b"\x09\0\0\0\0" * 5_000_000, wire.WHOLE),
        (b"\x01" + (wire.MAX_PAYLOAD).to_bytes(4, "big") + bytes(wire.MAX_PAYLOAD + 1), wire.WHOLE),
        (bytes(wire.MAX_PAYLOAD + 1), wire.FIRST),
        (bytes(wire.MAX_PAYLOAD + 1), wire.LAST),
    ],
    ids=["many small ones", "millions of empty ones", "a part of one", "a first part", "a last part"],
)
def test_a_large_fragment_that_is_not_one_record_is_refused_before_any_is_made(
    payload: bytes, shape: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A in the wrong hands could otherwise have B make five million records of one ticket."""
    made: list[int] = []
    monkeypatch.setattr(wire, "_decode_record", lambda kind, body: made.append(kind))
    tray = Tray()
    fragment = authentic(payload, shape=shape, total=len(payload))
    tray.memory[: len(fragment)] = fragment
    ticket = memoryview(wire.TICKET.pack(len(fragment)))
    with pytest.raises(WireError, match="not one record"):
        tray.sink.decode(tray.sink.taken_out(tray.memory, ticket), 9, own=True)
    assert made == []


def test_the_second_large_record_of_a_call_is_split() -> None:
    """The first may still lie in the tray."""
    tray = Tray()
    records: list[r.Record] = [big(1), end(2), big(3), end(4)]
    assert [_kept(arrival.record) for arrival in tray.through(*records)] == records
    assert tray.sizes[0] > 0
    assert not any(tray.sizes[1:])


def test_a_fragment_of_a_tray_amid_a_split_record_gives_that_up_and_comes_whole() -> None:
    tray = Tray()
    first, *_ = encode(big(1), by=tray.source)
    assert into_room(tray.sink, first) == []
    before = tray.sink.counters.gaps
    (arrival,) = tray.through(big(2))
    assert _kept(arrival.record) == big(2)
    assert tray.sink.counters.gaps == before + 1


@pytest.mark.parametrize(
    "size", [0, 57, wire.MAX_FRAGMENT, wire.MAX_LARGE_FRAGMENT, wire.MAX_LARGE_FRAGMENT + 1, 2**32 - 1]
)
def test_a_ticket_that_names_nothing_of_ours_is_refused(size: int) -> None:
    tray = Tray()
    with pytest.raises(WireError):
        tray.sink.decode(tray.sink.taken_out(tray.memory, memoryview(wire.TICKET.pack(size))), 9, own=True)
    assert sum(tray.sink.counters.refused.values()) == 1


def test_a_ticket_without_a_tray_is_refused() -> None:
    with pytest.raises(WireError, match="fragment of 4 bytes"):
        decoder().decode(memoryview(wire.TICKET.pack(1000)), 9)


def test_records_before_and_after_a_large_one_stay_in_order() -> None:
    records: list[r.Record] = [end(1), part(2), picture(640, 480), end(3), picture(640, 480, seq=1), part(4)]
    assert decode(encode(*records)) == records


def test_a_manifest_of_full_length_is_one_fragment() -> None:
    rows = tuple(
        r.ManifestEntry(id=f"{number:032x}", size=1, sha256=SHA256)
        for number in range(r.MAX_MANIFEST_ENTRIES)
    )
    fragments = encode(r.Manifest(entries=rows))
    assert len(fragments) == 1
    assert decode(fragments) == [r.Manifest(entries=rows)]


# What must not pass


def refused(fragment: bytes | bytearray, by: wire.Decoder | None = None) -> str:
    into = by or decoder()
    with pytest.raises(WireError) as caught:
        into.decode(memoryview(fragment), 0)
    assert into.counters.refused[caught.value.reason] >= 1
    return caught.value.reason


def test_a_key_of_the_wrong_length_is_our_fault() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        wire.Encoder(lane=1, key=b"short", epoch=1)


def test_another_key_is_refused() -> None:
    assert refused(encode(end(1), by=encoder(key=OTHER_KEY))[0]) == "mac"


def test_another_lane_is_refused_although_it_has_the_key() -> None:
    assert refused(encode(end(1), by=encoder(lane=LANE + 1))[0]) == "lane"


def test_an_epoch_that_is_over_is_refused() -> None:
    sink = decoder()
    old, new = encode(end(1), by=encoder(epoch=4))[0], encode(end(2), by=encoder(epoch=5))[0]
    assert decode([old, new], sink) == [end(1), end(2)]
    assert refused(old, sink) == "stale"
    assert sink.epoch == 5


def test_a_forged_later_epoch_does_not_move_the_decoder() -> None:
    sink = decoder()
    source = encoder()
    decode(encode(end(1), by=source), sink)
    assert refused(encode(end(2), by=encoder(epoch=900, key=OTHER_KEY))[0], sink) == "mac"
    assert decode(encode(end(3), by=source), sink) == [end(3)]


def test_what_came_before_is_a_duplicate_and_dropped() -> None:
    sink = decoder()
    fragments = [encode(end(number), by=source)[0] for source in [encoder()] for number in range(3)]
    assert decode(fragments, sink) == [end(0), end(1), end(2)]
    assert decode([fragments[2], fragments[0]], sink) == []
    assert sink.counters.duplicates == 2
    assert sink.counters.gaps == 0


def test_a_gap_is_counted_with_its_length() -> None:
    sink = decoder()
    fragments = [encode(end(number), by=source)[0] for source in [encoder()] for number in range(6)]
    assert decode([fragments[0], fragments[4], fragments[5]], sink) == [end(0), end(4), end(5)]
    assert (sink.counters.gaps, sink.counters.missing) == (1, 3)


def test_the_beginning_of_a_later_epoch_is_missed_when_it_does_not_come() -> None:
    sink = decoder()
    decode(encode(end(1), by=encoder(epoch=1)), sink)
    late = [encode(end(number), by=source)[0] for source in [encoder(epoch=2)] for number in range(3)]
    assert decode(late[2:], sink) == [end(2)]
    assert (sink.counters.gaps, sink.counters.missing) == (1, 2)


def test_a_sink_that_begins_in_the_middle_misses_nothing() -> None:
    sink = decoder()
    late = [encode(end(number), by=source)[0] for source in [encoder()] for number in range(3)]
    assert decode(late[2:], sink) == [end(2)]
    assert sink.counters.gaps == 0


@pytest.mark.parametrize("lost", range(4))
def test_a_picture_that_lost_a_fragment_is_given_up_and_the_next_is_whole(lost: int) -> None:
    sink, source = decoder(), encoder()
    broken = encode(picture(640, 480), by=source)
    assert len(broken) == 4
    del broken[lost]
    whole = encode(picture(640, 480, seq=1), by=source)
    assert decode(broken + whole, sink) == [picture(640, 480, seq=1)]
    assert not sink.counters.refused


def test_a_sink_that_restarts_within_a_picture_begins_with_the_next() -> None:
    source = encoder()
    first, second = encode(picture(640, 480), by=source), encode(picture(640, 480, seq=1), by=source)
    sink = decoder()
    assert decode(first[2:] + second, sink) == [picture(640, 480, seq=1)]
    assert not sink.counters.refused


def test_a_source_that_gave_up_within_a_picture_does_no_harm() -> None:
    source = encoder()
    abandoned = encoding(source, picture(640, 480))
    begun = [next(abandoned), next(abandoned)]
    assert decode(begun + encode(end(1), picture(640, 480, seq=1), by=source)) == [
        end(1),
        picture(640, 480, seq=1),
    ]


def authentic(
    payload: bytes, *, shape: int = wire.WHOLE, total: int = 0, seq: int = 0, **fields: Any
) -> bytearray:
    """A fragment that a source in the wrong hands can make: the key is right, the rest is as told."""
    values: dict[str, Any] = {
        "magic": wire.MAGIC,
        "version": wire.VERSION,
        "lane": LANE,
        "zero": 0,
        "epoch": 1,
        "pad": 0,
    }
    values |= {"size": len(payload), **fields}
    head = wire.HEADER.pack(
        values["magic"],
        values["version"],
        shape,
        values["lane"],
        values["zero"],
        values["epoch"],
        total,
        seq,
        0,
        values["size"],
        values["pad"],
    )
    fragment = bytearray(head + payload)
    nonce = values["epoch"].to_bytes(4, "big") + seq.to_bytes(8, "big")
    return fragment + wire.epoch_key(KEY, values["epoch"]).encrypt(nonce, b"", bytes(fragment))


def record(kind: int, body: bytes, size: int | None = None) -> bytes:
    return bytes([kind]) + (len(body) if size is None else size).to_bytes(4, "big") + body


HOSTILE: dict[str, tuple[bytearray, str]] = {
    "empty": (bytearray(), "malformed"),
    "a header and no payload": (authentic(b""), "malformed"),
    "another magic": (authentic(b"x", magic=b"FM"), "malformed"),
    "another version": (authentic(b"x", version=2), "malformed"),
    "shape 0": (authentic(b"x", shape=0), "malformed"),
    "shape 5": (authentic(b"x", shape=5), "malformed"),
    "the first reserved field used": (authentic(b"x", zero=1), "malformed"),
    "the second reserved field used": (authentic(b"x", pad=1), "malformed"),
    "a payload size that is too small": (authentic(b"xx", size=1), "malformed"),
    "a payload size that is too large": (authentic(b"x", size=2**32 - 1), "malformed"),
    "a fragment that is too long": (authentic(bytes(wire.MAX_PAYLOAD + 1)), "malformed"),
    "half a record prefix": (authentic(b"\1\0"), "malformed"),
    "a record longer than the payload": (authentic(record(8, bytes(8), size=9)), "malformed"),
    "a record of 4 GiB": (authentic(record(4, bytes(64), size=2**32 - 1)), "malformed"),
    "type 0": (authentic(record(0, b"")), "malformed"),
    "type 10": (authentic(record(10, b"")), "malformed"),
    "a body cut short": (authentic(record(3, bytes(10))), "record"),
    "a body with something after it": (authentic(record(8, bytes(9))), "record"),
    "a part without data": (authentic(record(4, bytes(24))), "record"),
    "a picture of 65535 x 65535": (authentic(record(1, bytes(68) + b"\xff\xff\xff\xff\0")), "record"),
    "a picture without its planes": (authentic(record(1, bytes(68) + b"\0\x40\0\x40\0")), "record"),
    "a picture that tells more than whether it is refreshed": (
        authentic(record(1, b"a".ljust(32, b"\0") + bytes(36) + b"\0\x10\0\x10\2" + bytes(384))),
        "record",
    ),
    "a stream name that is not ASCII": (authentic(record(6, b"\xff" * 32 + bytes(9))), "record"),
    "a stream name with a NUL in it": (
        authentic(record(6, b"a\0b".ljust(32, b"\0") + b"\1" + bytes(8))),
        "record",
    ),
    "a stream of no kind": (authentic(record(6, b"a".ljust(32, b"\0") + b"\3" + bytes(8))), "record"),
    "a manifest that is no whole number of rows": (authentic(record(9, bytes(57))), "record"),
    "too long a manifest": (authentic(record(9, (bytes(23) + b"\1" + bytes(32)) * 513)), "record"),
    "a split record that would fit": (authentic(b"x", shape=wire.FIRST, total=wire.MAX_PAYLOAD), "malformed"),
    "a split record of 4 GiB": (authentic(b"x", shape=wire.FIRST, total=2**32 - 1), "malformed"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_source_in_the_wrong_hands_is_refused_and_counted(name: str) -> None:
    fragment, reason = HOSTILE[name]
    sink = decoder()
    assert refused(fragment, sink) == reason
    assert decode([authentic(record(8, bytes(8)), seq=1)], sink) == [r.Heartbeat(sent_ns=0)]


def test_pieces_beyond_the_announced_size_are_refused_before_they_are_kept() -> None:
    sink, total = decoder(), wire.MAX_PAYLOAD + 10
    first = authentic(bytes(wire.MAX_PAYLOAD), shape=wire.FIRST, total=total)
    assert decode([first], sink) == []
    more = authentic(bytes(wire.MAX_PAYLOAD), shape=wire.MIDDLE, total=total, seq=1)
    assert refused(more, sink) == "malformed"
    assert sink._partial is None


@pytest.mark.parametrize(
    ("shape", "total"), [(wire.LAST, wire.MAX_PAYLOAD + 11), (wire.MIDDLE, wire.MAX_PAYLOAD + 10)]
)
def test_pieces_that_change_their_mind_are_refused(shape: int, total: int) -> None:
    sink = decoder()
    decode([authentic(bytes(wire.MAX_PAYLOAD), shape=wire.FIRST, total=wire.MAX_PAYLOAD + 10)], sink)
    assert refused(authentic(bytes(10), shape=shape, total=total, seq=1), sink) == "malformed"


def test_one_bit_anywhere_is_enough_to_be_refused() -> None:
    (good,) = encode(end(1), r.Heartbeat(sent_ns=3))
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        assert refused(bad) in {"malformed", "lane", "mac"}


@given(st.binary(max_size=400))
@settings(max_examples=200)
def test_noise_raises_nothing_but_wire_error(noise: bytes) -> None:
    refused(noise)


@given(st.binary(min_size=1, max_size=400), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_authentic_noise_raises_nothing_but_wire_error(noise: bytes, shape: int, total: int) -> None:
    try:
        decoder().decode(memoryview(authentic(noise, shape=shape, total=total)), 0)
    except WireError as error:
        assert error.reason in {"malformed", "record"}


def _fuzz(rounds: int, seed: int) -> None:
    """Authentic fragments of every kind with some bytes changed before they are signed, into one decoder."""
    chance = random.Random(seed)
    sink = decoder()
    bodies = [
        bytes(encode(item)[0][wire.HEADER.size : -wire.TAG_BYTES]) for item in (end(1), part(1), picture())
    ]
    bodies += [bytes([kind]) + bytes(4) + bytes(120) for kind in range(1, 10)]
    for seq in range(rounds):
        payload = bytearray(chance.choice(bodies))
        for _ in range(chance.randrange(4)):
            payload[chance.randrange(min(len(payload), 160))] = chance.randrange(256)
        shape = chance.choice((1, 1, 1, 2, 3, 4))
        total = chance.choice((0, len(payload), wire.MAX_PAYLOAD + 1, wire.MAX_RECORD, 2**32 - 1))
        fragment = authentic(bytes(payload), shape=shape, total=total, seq=seq)
        try:
            sink.decode(memoryview(fragment), 0)
        except WireError:
            assert sum(sink.counters.refused.values()) <= seq + 1
        assert len(sink._partial or b"") <= wire.MAX_RECORD
    assert sum(sink.counters.refused.values()) > rounds / 4
    assert decode([authentic(record(8, bytes(8)), seq=rounds)], sink) == [r.Heartbeat(sent_ns=0)]


def test_changed_and_signed_again_is_refused_or_valid() -> None:
    _fuzz(3_000, seed=1)


@pytest.mark.slow
def test_changed_and_signed_again_a_million_times() -> None:
    _fuzz(1_000_000, seed=2)


def test_repr_tells_where_a_codec_is() -> None:
    source, sink = encoder(), decoder()
    decode(encode(end(1), by=source), sink)
    assert repr(source) == "<Encoder lane=7 epoch=1 seq=1>"
    assert repr(sink).startswith("<Decoder lane=7 epoch=1 next=1 ")
    assert KEY.hex() not in repr(source) + repr(sink)


def into_room(sink: wire.Decoder, fragment: bytes | bytearray, now: int = 9) -> list[Arrival]:
    """Receive as a socket does, and decode."""
    room = sink.room()
    assert len(room) > wire.MAX_FRAGMENT
    room[: len(fragment)] = fragment
    return sink.decode(room[: len(fragment)], now)


def test_a_picture_put_together_in_place_is_whole_and_stays() -> None:
    source, sink = encoder(), decoder()
    kept = []
    for seq in range(4):
        sent = big(seq)
        *_, last = [into_room(sink, fragment) for fragment in encode(sent, by=source)]
        kept.append((sent, last[0]))
    for sent, arrival in kept:
        assert arrival.record == sent
        assert arrival.pixels is not None
        assert bytes(arrival.pixels) == b"".join(map(bytes, sent.planes))


def test_only_a_picture_in_memory_of_its_own_may_be_kept() -> None:
    small = picture()
    (arrival,) = decoder().decode(memoryview(encode(small)[0]), 9)
    assert arrival.record == small
    assert arrival.pixels is None


@given(st.lists(st.sampled_from(("right", "twice", "forged", "cut", "heartbeat")), min_size=10, max_size=60))
@settings(max_examples=60, deadline=None)
def test_whatever_comes_into_a_records_memory_spoils_nothing(steps: list[str]) -> None:
    source, sink = encoder(), decoder()
    wanted = [big(seq) for seq in range(8)]
    waiting = [fragment for sent in wanted for fragment in encode(sent, by=source)]
    found = []
    last = bytearray()
    # What comes first of all may be of any epoch.
    for step in ["right", *steps, *["right"] * len(waiting)]:
        if not waiting:
            break
        if step == "right":
            last = waiting.pop(0)
            found += [arrival.record for arrival in into_room(sink, last)]
            continue
        other = {
            "twice": last,
            "forged": waiting[0][:-1] + bytes((waiting[0][-1] ^ 1,)),
            "cut": waiting[0][:50],
        }.get(step)
        if other is None:
            # Of an epoch that is over, as a restarted source's predecessor may have left it.
            other = encode(r.Heartbeat(sent_ns=1), by=encoder(epoch=0))[0]
        try:
            assert into_room(sink, other) == []
        except WireError:
            pass
    assert found == wanted[: len(found)]
    assert len(found) == 8


def big(seq: int) -> r.VideoFrame:
    """A picture of several fragments, none like another."""
    width, height = 640, 480
    noise = random.Random(seq).randbytes(width * height * 3 // 2)
    y, c = width * height, width * height // 4
    return r.VideoFrame(
        stream="room",
        epoch=1,
        seq=seq,
        captured_ns=1,
        decoded_ns=2,
        media_ns=3,
        width=width,
        height=height,
        planes=(noise[:y], noise[y : y + c], noise[y + c :]),
    )
