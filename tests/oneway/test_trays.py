"""Attacks on the trays: B cannot signal through its own, and A gets nothing past the valve through its."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from relay import valve as v
from relay import wire
from relay.link import Arrival
from relay.memory import MAX_KEPT
from relay.records import Record, VideoFrame
from relay.trays import Trays, make_trays, tray_to_read, tray_to_write
from relay.valve_link import ValveInlet
from tests.fake_lane import kit
from tests.oneway.kit import Valve, link, mapped, receive, until
from tests.relay.samples import KEY, LANE, end, picture
from tests.relay.test_valve import figures
from tests.relay.test_wire import authentic, encode, encoder

F_GETLEASE, F_NOTIFY = 1025, 1026
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
F_SEAL_FUTURE_WRITE = 16
_libc = ctypes.CDLL(None, use_errno=True)

MEMORY = 2 << 20
"""Bytes that either process may grow by: allocator's noise."""


@pytest.fixture
def trays() -> Iterator[Trays]:
    made = make_trays()
    yield made
    made.close()


def fallocate(fd: int, mode: int) -> None:
    if _libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(4096)) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


CHANGES: dict[str, Callable[[int], object]] = {
    "write": lambda fd: os.pwrite(fd, b"x", 0),
    "map to write": lambda fd: mmap.mmap(fd, v.TRAY_BYTES),
    "shorten": lambda fd: os.ftruncate(fd, 0),
    "lengthen": lambda fd: os.ftruncate(fd, 2 * v.TRAY_BYTES),
    "punch a hole": lambda fd: fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE),
    "reserve": lambda fd: fallocate(fd, 0),
    "seal": lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE),
}


@pytest.mark.parametrize("change", CHANGES)
def test_who_reads_a_tray_cannot_change_it(trays: Trays, change: str) -> None:
    for reader in (trays.valve_in, trays.sink_end):
        with pytest.raises(OSError) as caught:
            CHANGES[change](reader)
        assert caught.value.errno in (errno.EBADF, errno.EACCES, errno.EPERM, errno.EINVAL)
    view = tray_to_read(os.dup(trays.sink_end))
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 1


@pytest.mark.parametrize("change", ["shorten", "lengthen", "seal"])
def test_not_even_who_writes_a_tray_can_end_its_reader(trays: Trays, change: str) -> None:
    """A page that is gone would be a SIGBUS there; a seal would be a bit that stays."""
    for writer in (trays.source_end, trays.valve_out):
        with pytest.raises(PermissionError):
            CHANGES[change](writer)
    assert os.fstat(trays.source_end).st_size == v.TRAY_BYTES


def test_a_hole_that_a_punches_reads_as_zeros(trays: Trays) -> None:
    tray_to_write(os.dup(trays.source_end))[:4096] = b"x" * 4096
    CHANGES["punch a hole"](trays.source_end)
    assert bytes(tray_to_read(os.dup(trays.valve_in))[:4096]) == bytes(4096)


@pytest.mark.root
@pytest.mark.skipif(not kit.root(), reason="needs root: run the tests as root")
def test_with_a_uid_of_its_own_a_reader_cannot_open_its_tray_for_writing(trays: Trays) -> None:
    """Through /proc/self/fd, as a pipe's read end can be."""
    script = (
        "import errno, os, sys\n"
        "for mode in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY):\n"
        "    try:\n        os.open(f'/proc/self/fd/{sys.argv[1]}', mode)\n"
        "    except PermissionError:\n        continue\n"
        "    sys.exit('opened again')\n"
        "try:\n    os.fchmod(int(sys.argv[1]), 0o777)\n"
        "except PermissionError:\n    sys.exit(0)\n"
        "sys.exit('made open to all')\n"
    )
    command = [sys.executable, "-I", "-c", script, str(trays.sink_end)]
    done = subprocess.run(
        command,
        user=61_000,
        group=61_000,
        extra_groups=[],
        pass_fds=[trays.sink_end],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def views(fd: int) -> dict[str, object]:
    """All that the holder of a tray's descriptor can learn from it but its contents."""
    status = os.fstat(fd)
    with mmap.mmap(fd, v.TRAY_BYTES, prot=mmap.PROT_READ) as memory:
        contents = hash(bytes(memory[: 1 << 16]))
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
        locked = False
    except BlockingIOError:
        locked = True
    return {
        "contents": contents,
        "size": (status.st_size, status.st_blocks, status.st_nlink),
        "owner": (status.st_mode, status.st_uid, status.st_gid),
        "times": (status.st_mtime_ns, status.st_ctime_ns),
        "locked": locked,
        "lease": fcntl.fcntl(fd, F_GETLEASE),
        "seals": fcntl.fcntl(fd, fcntl.F_GET_SEALS),
    }


def _own_writable(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR)


DEEDS_OF_B: dict[str, Callable[[int], object]] = {
    "lock": lambda fd: fcntl.flock(fd, fcntl.LOCK_EX),
    "ask for a lease": lambda fd: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK),
    "set times": lambda fd: os.utime(fd, ns=(1, 1)),
    "set the mode": lambda fd: os.fchmod(fd, 0o000),
    "set an attribute": lambda fd: os.setxattr(fd, "user.a", b"1"),
    "write, where uids are not apart": lambda fd: os.pwrite(_own_writable(fd), b"signal", 0),
    "punch a hole, likewise": lambda fd: CHANGES["punch a hole"](_own_writable(fd)),
}


@pytest.mark.parametrize("deed", DEEDS_OF_B)
def test_one_tray_alone_would_not_have_been_enough(trays: Trays, deed: str) -> None:
    """The same deeds on a tray do show to who holds the same one, so the test below sees what it claims."""
    before = views(trays.valve_out)
    DEEDS_OF_B[deed](trays.sink_end)
    assert views(trays.valve_out) != before


@pytest.mark.parametrize("deed", DEEDS_OF_B)
def test_nothing_that_b_does_to_its_tray_shows_on_a_or_stops_the_valve(deed: str) -> None:
    """Nor what it could do only without uids of their own."""
    with link(trays=True) as valve:
        assert valve.trays is not None
        a, _ = mapped(valve)
        source = encoder()
        assert _through(valve, a, encode_large(picture(640, 480), source)) == picture(640, 480)
        before = views(valve.trays.source_end)
        DEEDS_OF_B[deed](valve.trays.sink_end)
        assert views(valve.trays.source_end) == before
        assert _through(valve, a, encode_large(picture(640, 480, seq=1), source)) == picture(640, 480, seq=1)


def encode_large(record: VideoFrame, by: wire.Encoder) -> bytearray:
    """The one fragment of a picture that goes by tray."""
    (fragment,) = by.encode_into(
        memoryview(bytearray(wire.MAX_FRAGMENT)), (record,), lambda: 5, memoryview(bytearray(v.TRAY_BYTES))
    )
    assert len(fragment) > wire.MAX_FRAGMENT
    return bytearray(fragment)


def _through(valve: Valve, tray: memoryview, fragment: bytearray) -> Record:
    """What B makes of a fragment that A leaves in its tray."""
    tray[: len(fragment)] = fragment
    valve.pairs.source_end.send(wire.TICKET.pack(len(fragment)))
    ticket, _ = receive(valve.pairs.sink_end)
    _, b = mapped(valve)
    sink = wire.Decoder(lane=LANE, key=KEY)
    (arrival,) = sink.decode(sink.taken_out(b, memoryview(ticket)), 9, own=True)
    return arrival.record


REFUSED: dict[str, tuple[bytearray, str]] = {
    "another lane": (authentic(bytes(200_000), lane=LANE + 1), "lane"),
    "another magic": (authentic(bytes(200_000), magic=b"XX"), "shape"),
    "an epoch that nobody was given": (authentic(bytes(200_000), epoch=2**32 - 1), "order"),
    "a wrong payload size": (authentic(bytes(200_000), size=7), "size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_of_what_the_valve_refuses_nothing_comes_into_bs_tray(name: str) -> None:
    fragment, reason = REFUSED[name]
    with link(trays=True) as valve:
        a, b = mapped(valve)
        a[: len(fragment)] = fragment
        valve.pairs.source_end.send(wire.TICKET.pack(len(fragment)))
        assert figures(valve.reports) == {"fragments": 0, "bytes": 0, reason: 1}
        assert bytes(b[: len(fragment)]) == bytes(len(fragment))


@pytest.mark.parametrize("size", [0, 1, 4, 56, 57, v.MAX_FRAGMENT, v.TRAY_BYTES + 1, 2**31, 2**32 - 1])
def test_a_ticket_for_what_no_tray_holds_is_refused(size: int) -> None:
    with link(trays=True) as valve:
        valve.pairs.source_end.send(wire.TICKET.pack(size))
        assert figures(valve.reports) == {"fragments": 0, "bytes": 0, "size": 1}
        assert valve.process.poll() is None


def test_a_ticket_where_the_link_has_no_trays_is_refused() -> None:
    with link() as valve:
        valve.pairs.source_end.send(wire.TICKET.pack(1000))
        assert figures(valve.reports) == {"fragments": 0, "bytes": 0, "size": 1}


def test_the_rate_counts_what_lies_in_the_tray() -> None:
    fragment = encode_large(picture(640, 480), encoder())
    with link(trays=True, rate=4 * len(fragment)) as valve:
        a, _ = mapped(valve)
        a[: len(fragment)] = fragment
        valve.pairs.source_end.send(wire.TICKET.pack(len(fragment)))
        valve.pairs.sink_end.settimeout((0.25 - v.BURST_SECONDS) / 2)
        with pytest.raises(TimeoutError):
            valve.pairs.sink_end.recv(100)
        receive(valve.pairs.sink_end)


class Scribbler:
    """A in the wrong hands: changes its tray without end while the valve reads it."""

    def __init__(self, tray: memoryview, fragment: bytearray) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(tray, bytes(fragment)))

    def _run(self, tray: memoryview, good: bytes) -> None:
        chance = random.Random(5)
        bad = authentic(b"x", lane=LANE + 1, epoch=2**32 - 1)[: wire.HEADER.size]
        while not self._over.is_set():
            tray[: wire.HEADER.size] = bad
            at = chance.randrange(wire.HEADER.size, len(good))
            tray[at] ^= 0xFF
            tray[: len(good)] = good

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


async def test_a_that_changes_its_tray_while_the_valve_reads_gets_nothing_through_but_what_it_signed() -> (
    None
):
    """B sees the header that was checked, whatever A put there since, and no picture that is torn."""
    rounds = 400
    with link(trays=True) as valve:
        a, b = mapped(valve)
        source = encoder()
        sink = ValveInlet(valve.pairs.sink_end, wire.Decoder(lane=LANE, key=KEY), b)
        heard: list[Record] = []
        done = asyncio.Event()

        def deliver(arrival: Arrival) -> None:
            if arrival.record == end(99):
                done.set()
            else:
                assert arrival.pixels is not None
                heard.append(arrival.record)

        pump = asyncio.create_task(sink.pump(deliver))
        valve.pairs.source_end.setblocking(False)
        for seq in range(rounds):
            fragment = encode_large(picture(320, 288, seq=seq), source)
            a[: len(fragment)] = fragment
            # The first is left alone: what is missing is counted from there.
            with Scribbler(a, fragment) if seq else contextlib.nullcontext():
                valve.pairs.source_end.send(wire.TICKET.pack(len(fragment)))
                while v.untaken(valve.pairs.source_end):
                    await asyncio.sleep(0)
        valve.pairs.source_end.send(encode(end(99), by=source)[0])
        await asyncio.wait_for(done.wait(), 30)
        pump.cancel()
        counters = sink.decoder.counters
        assert set(counters.refused) <= {"mac"}, "the valve keeps all else from B"
        # Missing are those of which the valve refused the header, and those that were torn.
        assert len(heard) + counters.missing == rounds
        assert counters.refused["mac"] > 0, "the attack came in time at least once"
        torn = [record for record in heard if not isinstance(record, VideoFrame) or not whole(record)]
        assert torn == []


def whole(record: VideoFrame) -> bool:
    """Whether it is what `picture` made, without pytest's own comparison of so many bytes."""
    made = picture(record.width, record.height, record.seq).planes
    return all(bytes(plane) == bytes(wanted) for plane, wanted in zip(record.planes, made, strict=True))


async def test_noise_in_trays_and_tickets_costs_no_memory_and_stops_nothing() -> None:
    """Of either process: B, which is this one, keeps memory for one fragment, of 0.2 MB here."""
    chance = random.Random(8)
    with link(trays=True) as valve:
        a, b = mapped(valve)
        sink = ValveInlet(valve.pairs.sink_end, wire.Decoder(lane=LANE, key=KEY), b)
        heard = asyncio.Event()
        pump = asyncio.create_task(
            sink.pump(lambda arrival: heard.set() if arrival.record == end(99) else None)
        )
        valve.pairs.source_end.setblocking(False)
        for seq in range(600):
            size = chance.choice((57, 4096, 150_000, 150_001, 200_000))
            fragment = authentic(
                chance.randbytes(size),
                shape=chance.randrange(1, 5),
                total=chance.choice((0, 200_000, wire.MAX_RECORD, 2**32 - 1)),
                seq=seq,
            )
            a[: len(fragment)] = fragment
            shown = len(fragment) if chance.random() < 0.8 else chance.randrange(2**32)
            valve.pairs.source_end.send(wire.TICKET.pack(shown))
            while v.untaken(valve.pairs.source_end):
                await asyncio.sleep(0)
            if seq == 60:
                before = valve.resident_bytes()
                tracemalloc.start()
        traced, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert valve.resident_bytes() - before < MEMORY
        assert traced < MEMORY + MAX_KEPT * 200_000
        valve.pairs.source_end.send(encode(end(99), by=encoder(epoch=2))[0])
        await asyncio.wait_for(heard.wait(), 30)
        pump.cancel()
        assert valve.process.poll() is None
        assert sink.decoder.counters.refused["malformed"] > 100


def test_b_that_hangs_up_while_the_valve_waits_for_its_tray_ends_the_valve() -> None:
    """As it ends one that waits for its socket: who waits for B must not wait for ever."""
    with link(trays=True) as valve:
        a, _ = mapped(valve)
        source = encoder()
        for seq in range(2):
            fragment = encode_large(picture(320, 288, seq=seq), source)
            a[: len(fragment)] = fragment
            valve.pairs.source_end.send(wire.TICKET.pack(len(fragment)))
            if seq == 0:
                until(lambda: not v.untaken(valve.pairs.source_end), "the first is passed on")
        assert valve.process.poll() is None
        valve.pairs.sink_end.shutdown(0)
        until(lambda: valve.process.poll() is not None, "the valve ends")
