"""The receiver that is right about loss: RTP packets in, pictures or sound out in order, feedback to send.

    receive(packet) ─▶ [ Picture │ Nack │ KeyframeRequest … ]
    due(now)        ─▶ the same, when `deadline` has come

**Video.** A picture is released the moment its last packet (marker bit) is there and all before it were
released; after a repair everything that is ready goes at once. A gap is asked for at once, again by timer
with a limit, and waited for no longer than `hold_ns`, which follows the round trip. Then the damaged picture
is given up, a keyframe is asked for, and pictures flow again from the next keyframe: at the latest, where the
sender sends none, `CONCEAL_NS` later, when pictures are passed on although they refer to what was lost.

Not every sender answers: FFmpeg's RTP sender hears neither NACKs nor keyframe requests. So both are sent, but
waited for only as long as experience with this sender says that it is worth it.

**Audio.** A packet in order is released at once. A gap is waited for `AUDIO_HOLD_NS`, then named, so that it
can be concealed; a gap never leaves a delay behind.

Sans-I/O: the clock is whatever the caller passes. Sequence numbers are 64 bits wide inside.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from rtc.gaps import Gaps
from rtc.packets import RtpPacket

MS = 1_000_000

MAX_PACKETS = 8_192
"""Packets kept for one stream while a gap is open: more than half a second at 100 Mbit/s."""

MAX_MISSING = 1_024
"""Packets. Where more is missing, in one hole or in many, it is not repaired but skipped: a keyframe comes
sooner. Beyond `MAX_JUMP` it is another sequence."""

MAX_JUMP = 3_000
"""Packets forward, or behind, that still belong to the sequence (RFC 3550 A.1: MAX_DROPOUT)."""

MIN_NACK_NS = 15 * MS
"""Between two requests for one packet; below, the answer cannot be there yet but on the same machine."""

DEFAULT_RTT_NS = 50 * MS
"""Before it is measured."""

MIN_HOLD_NS = 80 * MS
MAX_HOLD_NS = 500 * MS
"""A longer wait is a longer freeze than a keyframe costs."""

REORDER_HOLD_NS = 30 * MS
"""The wait for a gap where nothing can be asked for: it is only for packets that overtook each other."""

KEYFRAME_REPEAT_NS = 250 * MS
"""Between two keyframe requests, or a round trip if that is longer."""

CONCEAL_NS = 600 * MS
"""After this time without the keyframe that was asked for, pictures pass with damaged references."""

START_NS = 3_000 * MS
"""The same for a stream that has not had a keyframe yet: it may use gradual refresh and never send one."""

TRUST_GAIN = 0.25
TRUST_LOSS = 0.85
"""How an answered and an unanswered request move the trust in a sender (0 to 1, half is enough): five in vain
end it, three answers win it, and a sender whose answers are late keeps it."""

MAX_REMEMBERED = 512
"""Given-up packets that are remembered, to notice answers that come too late."""

AUDIO_HOLD_NS = 40 * MS
"""Two packets of sound: what reordering needs, below what lip sync and a conversation notice."""

MAX_CONCEALED = 10
"""Packets of sound made up in a row (200 ms); after that silence is honest."""


@dataclass(frozen=True, slots=True)
class Picture:
    """The payloads of one picture, in order. `arrival_ns` is when its first packet was received."""

    payloads: tuple[bytes, ...]
    timestamp: int
    arrival_ns: int
    keyframe: bool
    damaged: bool
    """What it refers to may be missing."""
    serial: int = 0
    """Counts the pictures handed on."""


@dataclass(frozen=True, slots=True)
class Nack:
    """Ask for these sequence numbers (16 bits) again."""

    lost: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KeyframeRequest:
    """Ask for a keyframe: what follows cannot be decoded well."""


@dataclass(frozen=True, slots=True)
class Sound:
    """One packet of sound in order."""

    payload: bytes
    timestamp: int
    arrival_ns: int


@dataclass(frozen=True, slots=True)
class Silence:
    """`packets` of sound that did not come, before the one that follows."""

    packets: int


VideoOutput: TypeAlias = Picture | Nack | KeyframeRequest
AudioOutput: TypeAlias = Sound | Silence


@dataclass(slots=True)
class Tally:
    """What happened to a stream's packets, for status and metrics."""

    received: int = 0
    duplicate: int = 0
    late: int = 0
    """Came after they had been given up."""
    lost: int = 0
    """Given up."""
    repaired: int = 0
    """Missing, asked for, and then there."""
    nacks: int = 0
    keyframe_requests: int = 0
    skipped: int = 0
    """Pictures not passed on: damaged, or not decodable without what was lost."""
    concealed: int = 0
    restarts: int = 0
    overflows: int = 0
    """Times that more than `MAX_MISSING` was missing."""


@dataclass(slots=True)
class _Numbering:
    """Widens sequence numbers, and notices when a sender starts over (RFC 3550 A.1)."""

    highest: int = -1
    _suspect: RtpPacket | None = None
    """A packet far off, which its successor makes the first of a new sequence."""

    def widen(self, packet: RtpPacket) -> tuple[int, RtpPacket | None, bool] | None:
        """Number a packet; None to drop it, or to keep it here until its successor comes.

        Returns:
            The wide number, the packet before it where that one was kept, whether the sequence begins anew.
        """
        seq = packet.seq
        if self.highest < 0:
            # One cycle up, so that packets from before the first one stay positive.
            self.highest = (1 << 16) + seq
            return self.highest, None, True
        ahead = ((seq - self.highest + 0x8000) & 0xFFFF) - 0x8000
        if -MAX_JUMP < ahead < MAX_JUMP:
            self._suspect = None
            wide = self.highest + ahead
            self.highest = max(self.highest, wide)
            return wide, None, False
        # One stray packet is no restart; two that follow each other are.
        kept = self._suspect
        if kept is not None and (kept.seq + 1) & 0xFFFF == seq:
            self.highest += 1 << 16
            self.highest += ((seq - self.highest + 0x8000) & 0xFFFF) - 0x8000
            self._suspect = None
            return self.highest, kept, True
        self._suspect = packet
        return None


@dataclass(slots=True, kw_only=True)
class VideoJitter:
    """One video stream.

    A packet costs the same whatever is missing: what lies between `_next` and the highest number and is not
    kept is missing, so nobody lists it, and each number is walked over once.
    """

    starts: Callable[[bytes], bool]
    is_keyframe: Callable[[Sequence[bytes]], bool]
    trusting: bool = True
    """Whether answers to requests are expected before there is any experience with the sender."""
    rtt_ns: int | None = None
    """Set by the owner as it is measured."""
    tally: Tally = field(default_factory=Tally)
    _numbering: _Numbering = field(default_factory=_Numbering)
    _packets: dict[int, RtpPacket] = field(default_factory=dict)
    _gaps: Gaps = field(default_factory=Gaps)
    _next: int = 0
    """The first packet that was not released."""
    _cursor: int = 0
    """All from `_next` to before it are there and of one picture; it is missing, or the next to come."""
    _dead: int | None = None
    """RTP timestamp of a picture that was given up; what still comes of it is dropped."""
    _broken_ns: int | None = None
    """Since when a keyframe is awaited."""
    _requested_ns: int | None = None
    _had_keyframe: bool = False
    _serial: int = 0
    _keyframe_serial: int = 0
    """Of the last keyframe handed on."""
    _trust: float = field(init=False)
    """In answers to NACKs."""
    _keyframes_come: bool = field(init=False)
    """Whether the last keyframe request was answered in time."""
    _given_up: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """The last `MAX_REMEMBERED` numbers that were asked for in vain."""

    def __post_init__(self) -> None:
        self._trust = float(self.trusting)
        self._keyframes_come = self.trusting

    @property
    def hold_ns(self) -> int:
        """How long a gap is waited for."""
        if self._trust < 0.5:
            return REORDER_HOLD_NS
        rtt = DEFAULT_RTT_NS if self.rtt_ns is None else self.rtt_ns
        return min(max(4 * rtt, MIN_HOLD_NS), MAX_HOLD_NS)

    @property
    def held(self) -> int:
        """Packets kept now; never more than `MAX_PACKETS`."""
        return len(self._packets)

    @property
    def missing(self) -> int:
        """Packets that are missed now; never more than `MAX_MISSING`."""
        return self._numbering.highest + 1 - self._next - len(self._packets)

    @property
    def _gives_up_ns(self) -> int | None:
        """When the hold of the first missing packet ends; None where nothing is missing."""
        if self._cursor > self._numbering.highest:
            return None
        return self._gaps.since_ns(self._cursor) + self.hold_ns

    @property
    def deadline(self) -> int | None:
        """When `due` has something to do; None for never."""
        times = []
        if (gives_up_ns := self._gives_up_ns) is not None:
            times.append(gives_up_ns)
            times += [] if self._gaps.next_ns is None else [self._gaps.next_ns]
        if self._broken_ns is not None:
            times.append((self._requested_ns or self._broken_ns) + self._repeat_ns)
        return min(times, default=None)

    @property
    def _repeat_ns(self) -> int:
        return max(KEYFRAME_REPEAT_NS, self.rtt_ns or 0)

    def receive(self, packet: RtpPacket, now_ns: int) -> list[VideoOutput]:
        """Take one packet; what to hand on and to send because of it."""
        self.tally.received += 1
        before = self._numbering.highest
        numbered = self._numbering.widen(packet)
        if numbered is None:
            self.tally.late += 1
            return []
        wide, kept, anew = numbered
        if anew:
            self._restart(wide, kept, now_ns)
        elif wide < self._next:
            self.tally.late += 1
            if wide in self._given_up:
                self._answered()
            return []
        elif wide in self._packets:
            self.tally.duplicate += 1
            return []
        elif wide > before + 1:
            self._note_gap(before + 1, wide, now_ns)
        elif wide <= before:
            self.tally.repaired += 1
            self._gaps.came(wide)
            self._answered()
        self._packets[wide] = packet
        output = self._release(now_ns)
        if packet.marker and self.missing:
            output += self._jump_to_keyframe(wide, now_ns)
        if len(self._packets) > MAX_PACKETS:
            output += self._skip(self._numbering.highest, now_ns)
        return output + self._ask(now_ns)

    def due(self, now_ns: int) -> list[VideoOutput]:
        """What to hand on and to send because of the time."""
        output: list[VideoOutput] = []
        while (gives_up_ns := self._gives_up_ns) is not None and gives_up_ns <= now_ns:
            output += self._skip(self._cursor, now_ns)
        return output + self._ask(now_ns)

    def decoder_failed(self, serial: int, now_ns: int) -> list[VideoOutput]:
        """The decoder could not use picture `serial`: go on from a keyframe, unless one has followed."""
        if serial < self._keyframe_serial:
            return []
        self._break(now_ns)
        return self._ask(now_ns)

    def _answered(self) -> None:
        self._trust += (1 - self._trust) * TRUST_GAIN

    def _restart(self, wide: int, kept: RtpPacket | None, now_ns: int) -> None:
        if self._had_keyframe:
            self.tally.restarts += 1
        self._packets.clear()
        self._gaps.clear()
        self._next = self._cursor = wide
        if kept is not None:
            self._next = self._cursor = wide - 1
            self._packets[wide - 1] = kept
        self._dead = None
        self._break(now_ns)

    def _break(self, now_ns: int) -> None:
        if self._broken_ns is None:
            self._broken_ns = now_ns

    def _note_gap(self, first: int, end: int, now_ns: int) -> None:
        # The packet behind the gap is counted as the highest already, though not yet kept.
        missing = self.missing - 1
        if missing > MAX_MISSING:
            # What came between the holes is as lost as they are.
            self.tally.lost += missing
            self.tally.overflows += 1
            self._packets.clear()
            self._gaps.clear()
            self._next = self._cursor = end
            self._break(now_ns)
        else:
            self._gaps.open(first, end, now_ns)

    def _release(self, now_ns: int) -> list[VideoOutput]:
        """Hand on every picture that is whole and next."""
        output: list[VideoOutput] = []
        while (packet := self._packets.get(self._cursor)) is not None:
            if packet.timestamp == self._dead:
                self._drop_one()
                continue
            opening = self._packets[self._next]
            if packet.timestamp != opening.timestamp:
                # The sender sets no marker, or put two pictures back to back: the earlier one is whole.
                output += self._take(self._cursor, now_ns)
                continue
            self._cursor += 1
            if packet.marker:
                output += self._take(self._cursor, now_ns)
        return output

    def _drop_one(self) -> None:
        """Drop the packet at the cursor, a leftover of a picture that was given up."""
        del self._packets[self._cursor]
        self._cursor += 1
        self._next = self._cursor

    def _take(self, end: int, now_ns: int) -> list[VideoOutput]:
        """The picture from `_next` to before `end`, if it is of use."""
        packets = [self._packets.pop(wide) for wide in range(self._next, end)]
        self._next = self._cursor = end
        self._dead = None
        # Made a tuple from a list, whose length is known: one that grew to its length is never taken from the
        # freed ones that CPython keeps, only added to them.
        payloads = tuple([packet.payload for packet in packets if packet.payload])
        if not payloads:
            return []
        keyframe = self.is_keyframe(payloads) and self.starts(payloads[0])
        if keyframe:
            if self._broken_ns is not None and self._had_keyframe:
                self._keyframes_come = now_ns - self._broken_ns < CONCEAL_NS
            self._had_keyframe = True
            self._broken_ns = self._requested_ns = None
        damaged = self._broken_ns is not None
        if damaged and not self._may_conceal(now_ns):
            self.tally.skipped += 1
            return []
        self.tally.concealed += damaged
        arrival_ns = min(packet.arrival_ns for packet in packets)
        self._serial += 1
        if keyframe:
            self._keyframe_serial = self._serial
        return [Picture(payloads, packets[0].timestamp, arrival_ns, keyframe, damaged, self._serial)]

    def _may_conceal(self, now_ns: int) -> bool:
        assert self._broken_ns is not None
        if not self._had_keyframe:
            return now_ns - self._broken_ns >= START_NS
        if now_ns - self._broken_ns >= CONCEAL_NS:
            self._keyframes_come = False
        return not self._keyframes_come

    def _jump_to_keyframe(self, last: int, now_ns: int) -> list[VideoOutput]:
        """A keyframe that is whole behind a gap makes the gap worthless."""
        first = last
        timestamp = self._packets[last].timestamp if last in self._packets else None
        while (before := self._packets.get(first - 1)) is not None:
            if before.marker or before.timestamp != timestamp:
                break
            first -= 1
        payloads = [self._packets[wide].payload for wide in range(first, last + 1) if wide in self._packets]
        if not payloads or not self.is_keyframe(payloads) or not self.starts(payloads[0]):
            return []
        self._forget_until(first)
        return self._release(now_ns)

    def _forget_until(self, end: int) -> None:
        kept = len(self._packets)
        # Whichever is less to look through: the numbers that go, or the packets that are there.
        passed = range(self._next, end)
        gone = passed if len(passed) <= kept else [wide for wide in self._packets if wide < end]
        for wide in gone:
            self._packets.pop(wide, None)
        self.tally.lost += len(passed) - (kept - len(self._packets))
        for wide in self._gaps.forget(end):
            self._trust *= TRUST_LOSS
            self._given_up[wide] = None
        while len(self._given_up) > MAX_REMEMBERED:
            self._given_up.popitem(last=False)
        self._next = self._cursor = end

    def _skip(self, lost: int, now_ns: int) -> list[VideoOutput]:
        """Give up the picture that misses packet `lost`, and go on behind it."""
        self._break(now_ns)
        self.tally.skipped += 1
        start = lost + 1
        before = self._packets.get(lost - 1)
        for wide in range(lost + 1, self._numbering.highest + 1):
            packet = self._packets.get(wide)
            if packet is None:
                continue
            previous = self._packets.get(wide - 1)
            fresh = previous is not None and (previous.marker or previous.timestamp != packet.timestamp)
            unlike = before is None or before.marker or before.timestamp != packet.timestamp
            if fresh or (previous is None and unlike and self.starts(packet.payload)):
                start = wide
                break
            # It belongs to the lost one's picture, as far as can be known, and goes with it.
            self._dead = packet.timestamp
            start = wide + 1
            if packet.marker:
                break
        self._forget_until(start)
        return self._release(now_ns)

    def _ask(self, now_ns: int) -> list[VideoOutput]:
        """The requests that are due."""
        output: list[VideoOutput] = []
        interval = max(MIN_NACK_NS, (self.rtt_ns or DEFAULT_RTT_NS) * 5 // 4)
        due = self._gaps.due(now_ns, interval, self._cursor, self._packets)
        if due:
            self.tally.nacks += 1
            output.append(Nack(tuple([wide & 0xFFFF for wide in due])))  # from a list: see `_take`
        waited = self._requested_ns is None or now_ns - self._requested_ns >= self._repeat_ns
        if self._broken_ns is not None and waited:
            self._requested_ns = now_ns
            self.tally.keyframe_requests += 1
            output.append(KeyframeRequest())
        return output


@dataclass(slots=True, kw_only=True)
class AudioJitter:
    """One stream of sound."""

    tally: Tally = field(default_factory=Tally)
    _numbering: _Numbering = field(default_factory=_Numbering)
    _packets: dict[int, RtpPacket] = field(default_factory=dict)
    _next: int = 0
    _gap_ns: int | None = None
    """Since when the packet `_next` is missed."""

    @property
    def held(self) -> int:
        """Packets kept now."""
        return len(self._packets)

    @property
    def deadline(self) -> int | None:
        """When `due` has something to do; None for never."""
        return None if self._gap_ns is None else self._gap_ns + AUDIO_HOLD_NS

    def receive(self, packet: RtpPacket, now_ns: int) -> list[AudioOutput]:
        """Take one packet; what to play because of it."""
        self.tally.received += 1
        numbered = self._numbering.widen(packet)
        if numbered is None:
            self.tally.late += 1
            return []
        wide, kept, anew = numbered
        if anew:
            self._packets.clear()
            self._next, self._gap_ns = wide, None
            if kept is not None:
                self._next = wide - 1
                self._packets[wide - 1] = kept
        if wide < self._next:
            self.tally.late += 1
            return []
        if wide in self._packets:
            self.tally.duplicate += 1
            return []
        self._packets[wide] = packet
        output: list[AudioOutput] = []
        if len(self._packets) > MAX_CONCEALED:
            output += self._give_up()
        return output + self._release(now_ns)

    def due(self, now_ns: int) -> list[AudioOutput]:
        """What to play because of the time."""
        if self.deadline is None or now_ns < self.deadline:
            return []
        return self._give_up() + self._release(now_ns)

    def _give_up(self) -> list[AudioOutput]:
        following = min(self._packets)
        missing = following - self._next
        self._next, self._gap_ns = following, None
        self.tally.lost += missing
        made_up = min(missing, MAX_CONCEALED)
        self.tally.concealed += made_up
        return [Silence(made_up)] if made_up else []

    def _release(self, now_ns: int) -> list[AudioOutput]:
        output: list[AudioOutput] = []
        while (packet := self._packets.pop(self._next, None)) is not None:
            self._next += 1
            self._gap_ns = None
            if packet.payload:
                output.append(Sound(packet.payload, packet.timestamp, packet.arrival_ns))
        if self._packets and self._gap_ns is None:
            self._gap_ns = now_ns
        return output
