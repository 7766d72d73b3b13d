"""Attacks on the sockets: nothing that B holds can be turned round, and nothing but bytes of A's passes."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Callable, Iterator

import pytest

from relay.valve_link import Pairs, make_pairs
from tests.oneway.kit import link, receive, until
from tests.relay.samples import end
from tests.relay.test_wire import decode, encode, encoder

SIOCOUTQ = termios.TIOCOUTQ


@pytest.fixture
def pairs() -> Iterator[Pairs]:
    made = make_pairs()
    yield made
    made.close()


def number_of(action: Callable[[], object]) -> int | None:
    """The errno that `action` fails with."""
    with pytest.raises(OSError) as caught:
        action()
    return caught.value.errno


def ends(pairs: Pairs) -> dict[str, socket.socket]:
    return {
        "A": pairs.source_end,
        "valve from A": pairs.valve_in,
        "valve to B": pairs.valve_out,
        "B": pairs.sink_end,
    }


WRITERS, READERS = ("A", "valve to B"), ("valve from A", "B")


@pytest.mark.parametrize("name", READERS)
def test_a_reader_cannot_send(pairs: Pairs, name: str) -> None:
    sock = ends(pairs)[name]
    assert number_of(lambda: sock.send(b"answer")) == errno.EPIPE
    assert number_of(lambda: sock.sendmsg([b"answer"])) == errno.EPIPE
    with socket.socket() as carried:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [carried.fileno()]))]
        assert number_of(lambda: sock.sendmsg([b"a"], rights)) == errno.EPIPE
    assert number_of(lambda: os.write(sock.fileno(), b"answer")) == errno.EPIPE


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_hears_nothing(pairs: Pairs, name: str) -> None:
    sock = ends(pairs)[name]
    assert sock.recv(100) == b""
    assert sock.recvmsg(100, 1000)[:2] == (b"", [])
    assert os.read(sock.fileno(), 100) == b""


@pytest.mark.parametrize("name", [*WRITERS, *READERS])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND])
def test_no_end_can_be_opened_again(pairs: Pairs, name: str, flags: int) -> None:
    """A pipe's read end can be, for writing."""
    path = f"/proc/self/fd/{ends(pairs)[name].fileno()}"
    assert number_of(lambda: os.open(path, flags)) == errno.ENXIO


@pytest.mark.parametrize("name", [*WRITERS, *READERS])
def test_what_is_shut_stays_shut(pairs: Pairs, name: str, tmp_path: object) -> None:
    """No second connection, no listening, no further shutdown opens a direction again."""
    sock = ends(pairs)[name]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(f"\0medferry-test-{os.getpid()}-{name}")
        other.listen()
        assert number_of(lambda: sock.connect(other.getsockname())) in (errno.EISCONN, errno.EINVAL)
    assert number_of(sock.listen) == errno.EINVAL
    assert number_of(sock.accept) == errno.EINVAL
    for how in (socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR):
        with contextlib.suppress(OSError):
            sock.shutdown(how)
        if name in READERS:
            assert number_of(lambda: sock.send(b"x")) == errno.EPIPE
        else:
            assert sock.recv(10) == b""


@pytest.mark.parametrize("name", [*WRITERS, *READERS])
def test_there_is_no_out_of_band_data(pairs: Pairs, name: str) -> None:
    sock = ends(pairs)[name]
    assert number_of(lambda: sock.send(b"!", socket.MSG_OOB)) in (errno.EOPNOTSUPP, errno.EPIPE)


def views(sock: socket.socket) -> dict[str, object]:
    """All that the holder of a socket can learn from it without reading."""
    poll = select.poll()
    poll.register(sock, 0xFFFF)
    count = array.array("i", [0])
    queues = []
    for request in (SIOCOUTQ, termios.FIONREAD):
        try:
            fcntl.ioctl(sock, request, count)
            queues.append(count[0])
        except OSError as error:
            queues.append(-(error.errno or 0))
    options = (
        socket.SO_ERROR,
        socket.SO_TYPE,
        socket.SO_SNDBUF,
        socket.SO_RCVBUF,
        socket.SO_PASSCRED,
        socket.SO_RCVLOWAT,
        socket.SO_DOMAIN,
        socket.SO_ACCEPTCONN,
    )
    return {
        "own name": sock.getsockname(),
        "peer name": sock.getpeername(),
        "peer's process": struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)),
        "events": poll.poll(0),
        "queues": queues,
        "options": [sock.getsockopt(socket.SOL_SOCKET, option) for option in options],
        "flags": fcntl.fcntl(sock, fcntl.F_GETFL),
    }


def _peek_offset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, 42, 1)


def _credentials(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)


def _small_buffers(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)


DEEDS_OF_B: dict[str, Callable[[socket.socket], object]] = {
    "bind to a name": lambda sock: sock.bind(f"\0medferry-signal-{os.getpid()}"),
    "bind to any name": lambda sock: sock.bind(""),
    "ask for credentials": _credentials,
    "shrink buffers": _small_buffers,
    "set a peek offset": _peek_offset,
    "do not block": lambda sock: sock.setblocking(False),
    "ask for signals": lambda sock: fcntl.fcntl(sock, fcntl.F_SETOWN, os.getpid()),
    "stop reading": lambda sock: sock.shutdown(socket.SHUT_RD),
    "shut both ways": lambda sock: sock.shutdown(socket.SHUT_RDWR),
    "close": lambda sock: sock.close(),
}


@pytest.mark.parametrize("deed", DEEDS_OF_B)
def test_nothing_that_b_does_to_its_socket_shows_on_a(pairs: Pairs, deed: str) -> None:
    before = views(pairs.source_end)
    DEEDS_OF_B[deed](pairs.sink_end)
    assert views(pairs.source_end) == before


@pytest.mark.parametrize("deed", DEEDS_OF_B)
def test_one_pair_alone_would_not_have_been_enough(deed: str) -> None:
    """The same deeds on the pair next to A do show, so the test above sees what it claims to see."""
    visible = {"bind to a name", "bind to any name", "stop reading", "shut both ways", "close"}
    made = make_pairs()
    try:
        before = views(made.source_end)
        DEEDS_OF_B[deed](made.valve_in)
        assert (views(made.source_end) != before) == (deed in visible)
    finally:
        made.close()


def test_b_names_its_socket_and_only_the_valve_could_see_it(pairs: Pairs) -> None:
    name = f"\0medferry-name-{os.getpid()}"
    pairs.sink_end.bind(name)
    assert pairs.valve_out.getpeername() == name.encode()
    assert pairs.source_end.getpeername() in ("", b"")


def test_who_made_the_link_is_all_that_credentials_tell(pairs: Pairs) -> None:
    """SO_PEERCRED is of the process that made the pair, the supervisor: neither A's nor B's."""
    for sock in ends(pairs).values():
        pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        assert (pid, uid, gid) == (os.getpid(), os.getuid(), os.getgid())


def test_a_sees_how_full_its_own_pair_is_and_no_more(pairs: Pairs) -> None:
    """The one timing channel there is: when the valve took a fragment. What B did is not in it."""
    pairs.source_end.send(b"x" * 1000)
    full = views(pairs.source_end)
    assert full["queues"] != [0, 0]
    pairs.valve_out.send(b"y" * 1000)
    assert pairs.sink_end.recv(2000) == b"y" * 1000
    assert views(pairs.source_end) == full
    pairs.valve_in.recv(2000)
    assert views(pairs.source_end) != full


# Through the valve


def _fragment(number: int = 1) -> bytearray:
    return encode(end(number))[0]


@pytest.mark.parametrize("count", [1, 30])
def test_a_descriptor_that_a_passes_arrives_nowhere(count: int) -> None:
    with link() as valve:
        before = valve.descriptors()
        mine, passed = socket.socketpair()
        rights = array.array("i", [passed.fileno()] * count)
        valve.pairs.source_end.sendmsg([_fragment()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        passed.close()
        data, ancillary = receive(valve.pairs.sink_end)
        assert decode([bytearray(data)]) == [end(1)]
        assert ancillary == []
        # The kernel let go of the only other holder: whoever had got it could answer here.
        mine.settimeout(10)
        assert mine.recv(100) == b""
        mine.close()
        assert valve.descriptors() == before


def test_a_descriptor_on_a_refused_fragment_arrives_nowhere_either() -> None:
    with link() as valve:
        before = valve.descriptors()
        mine, passed = os.pipe()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [passed]))]
        for data in (b"x", b"", bytes(200_000)):
            valve.pairs.source_end.sendmsg([data], rights)
        os.close(passed)
        assert os.read(mine, 1) == b"", "end of file: nobody holds the write end"
        os.close(mine)
        assert valve.descriptors() == before


def test_a_passes_its_own_end_of_the_link_in_vain() -> None:
    """A socket in flight through itself: the valve goes on, B has one descriptor as before."""
    with link() as valve:
        rights = array.array("i", [valve.pairs.source_end.fileno()])
        valve.pairs.source_end.sendmsg([_fragment()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        data, ancillary = receive(valve.pairs.sink_end)
        assert (decode([bytearray(data)]), ancillary) == ([end(1)], [])


def test_credentials_that_b_asks_for_are_the_valves() -> None:
    with link() as valve:
        valve.pairs.sink_end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        mine = struct.pack("3i", os.getpid(), os.getuid(), os.getgid())
        valve.pairs.source_end.sendmsg([_fragment()], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, mine)])
        _, ((level, kind, data),) = receive(valve.pairs.sink_end)
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
        pid, _, _ = struct.unpack("3i", data)
        assert pid == valve.process.pid


def test_b_that_hangs_up_ends_the_valve_and_a_still_sees_nothing_but_fullness() -> None:
    with link() as valve:
        source = encoder()
        before = views(valve.pairs.source_end)
        valve.pairs.sink_end.shutdown(socket.SHUT_RD)
        valve.pairs.source_end.send(encode(end(1), by=source)[0])
        until(lambda: valve.process.poll() is not None, "the valve ends")
        after = views(valve.pairs.source_end)
        assert after.pop("queues") != before.pop("queues")
        assert after == before
