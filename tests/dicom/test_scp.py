"""The storage SCP on a socket: echo and store, back-pressure, who may in, limits, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket

import pytest

from dicom.acceptor import MAX_UNSENT_BYTES, Acceptor
from dicom.associate import decode_request
from dicom.policy import AcceptRule, Doorkeeper, Policy, plain_address
from dicom.scp import RECEIVE_BYTES, Rejection
from tests.dicom.associations import (
    ABORT,
    CT,
    EXPLICIT,
    IMPLICIT,
    RELEASE_RQ,
    VERIFICATION,
    abort,
    command_set,
    data_pdu,
    echo_message,
    pdv,
    rejection,
    request,
    store_command,
    store_message,
    u16,
    uid,
)
from tests.dicom.callers import ANYONE, SECONDS, serving, until

DATA = bytes(range(256)) * 300


async def test_an_echo_is_answered_and_the_association_released() -> None:
    async with serving() as station:
        caller = await station.associate()
        for number in (1, 2, 65535):
            caller.send(echo_message(number))
            response = await caller.command()
            assert (response.field, response.message_id, response.status) == (0x8030, number, 0)
            assert response.sop_class == VERIFICATION
        await caller.release()
        await until(lambda: station.server.stats()["open"] == 0)
        assert station.server.stats()["released"] == 1


async def test_an_object_arrives_as_it_was_sent() -> None:
    async with serving() as station:
        caller = await station.associate()
        assert await caller.store(DATA, message_id=5, fragment=4000) == 0
        assert await caller.store(b"", message_id=6) == 0
        [first, second] = station.archive.objects
        assert (bytes(first.data), bytes(second.data)) == (DATA, b"")
        assert first.finished and not first.abandoned
        got = first.request
        assert (got.abstract_syntax, got.sop_class, got.transfer_syntax) == (CT, CT, EXPLICIT)
        assert got.sop_instance == "2.25.1234567890"
        assert (got.peer.address, got.peer.calling_ae_title) == ("127.0.0.1", "SENDER")
        assert str(got.peer) == "SENDER at 127.0.0.1 (association 1)"
        await caller.release()


async def test_the_status_of_finish_is_answered() -> None:
    async with serving() as station:
        station.archive.status = 0xC001
        caller = await station.associate()
        assert await caller.store(b"data") == 0xC001
        await caller.release()


async def test_a_refused_object_is_read_and_dropped_and_the_association_goes_on() -> None:
    async with serving() as station:
        caller = await station.associate()
        station.archive.refuse_with = 0x0122
        assert await caller.store(DATA) == 0x0122
        station.archive.refuse_with = 0
        assert await caller.store(b"next") == 0
        assert station.archive.stored() == [b"next"]
        await caller.release()


async def test_an_object_that_fails_on_the_way_is_dropped_and_answered_when_it_is_whole() -> None:
    async with serving() as station:
        station.archive.room = 1000
        caller = await station.associate()
        assert await caller.store(DATA, fragment=100) == 0xA700
        assert station.archive.objects[0].abandoned and not station.archive.objects[0].finished
        station.archive.room = 1 << 30
        assert await caller.store(b"next") == 0
        await caller.release()


async def test_an_association_that_waits_does_not_hold_up_another() -> None:
    async with serving() as station:
        slow, quick = await station.associate(), await station.associate()
        station.archive.may_finish.clear()
        slow.send(store_message(b"slow"))
        await station.archive.finishing.wait()
        quick.send(echo_message())
        assert (await quick.command()).status == 0
        station.archive.may_finish.set()
        assert (await slow.command()).status == 0
        await slow.release()
        await quick.release()


async def test_pipelined_requests_are_answered_in_order_and_queue_at_the_sender() -> None:
    async with serving() as station:
        caller = await station.associate()
        station.archive.may_finish.clear()
        count = 2000
        objects = [number.to_bytes(2, "big") * 8000 for number in range(1, count + 1)]

        async def send() -> None:
            for number, data in enumerate(objects, 1):
                caller.send(store_message(data, message_id=number))
                await caller.writer.drain()

        sending = asyncio.create_task(send())
        await station.archive.finishing.wait()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        await asyncio.sleep(0.2)
        assert not sending.done(), "32 MB fit neither our buffer nor the sockets'"
        assert len(station.archive.objects) == 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000
        station.archive.may_finish.set()
        for number in range(1, count + 1):
            response = await caller.command()
            assert (response.message_id, response.status) == (number, 0)
        await sending
        assert station.archive.stored() == objects
        await caller.release()


async def test_answers_that_nobody_takes_stop_the_reading() -> None:
    async with serving() as station:
        caller = await station.associate(receive_bytes=4096)
        caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
        [acceptor] = station.server._established
        assert acceptor._options is not None
        acceptor._options.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sent = 0
        async with asyncio.timeout(SECONDS):
            while not acceptor._blocked:
                caller.send(echo_message() * 100)
                sent += 100
                await asyncio.sleep(0)
        caller.send(echo_message() * 5000)
        sent += 5000
        await asyncio.sleep(0.05)
        assert acceptor._transport.get_write_buffer_size() < 2 * MAX_UNSENT_BYTES
        assert len(acceptor._association._reader._view) <= RECEIVE_BYTES
        caller.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(sent):
            assert (await caller.command()).status == 0
        await caller.release()


@pytest.mark.parametrize("field", [0x0010, 0x0020, 0x0021, 0x0100, 0x0110, 0x0120, 0x0130, 0x0140, 0x0150])
@pytest.mark.parametrize("with_data", [True, False])
async def test_other_operations_are_answered_as_not_recognised(field: int, with_data: bool) -> None:
    async with serving() as station:
        caller = await station.associate()
        kind = 1 if with_data else 0x0101
        elements = ((0x0002, uid(CT)), (0x0100, u16(field)), (0x0110, u16(9)), (0x0800, u16(kind)))
        caller.send(data_pdu(pdv(3, 3, command_set(*elements))))
        if with_data:
            caller.send(data_pdu(pdv(3, 2, b"identifier")))
        response = await caller.command()
        assert (response.field, response.message_id, response.status) == (field | 0x8000, 9, 0x0211)
        assert await caller.store(b"next") == 0
        await caller.release()


async def test_store_and_echo_belong_to_their_own_contexts() -> None:
    async with serving() as station:
        caller = await station.associate()
        assert await caller.store(b"data", context_id=1) == 0x0211
        caller.send(echo_message(context_id=3))
        assert (await caller.command()).status == 0x0211
        assert station.archive.objects == []
        await caller.release()


async def test_a_store_without_data_set_is_refused_and_a_cancel_passed_over() -> None:
    async with serving() as station:
        caller = await station.associate()
        empty = command_set((0x0100, u16(1)), (0x0110, u16(2)), (0x0800, u16(0x0101)))
        cancel = command_set((0x0100, u16(0x0FFF)), (0x0120, u16(2)), (0x0800, u16(0x0101)))
        caller.send(data_pdu(pdv(3, 3, cancel)) + data_pdu(pdv(3, 3, empty)))
        response = await caller.command()
        assert (response.message_id, response.status) == (2, 0xC000)
        await caller.release()


async def test_answers_fit_a_peer_that_takes_little() -> None:
    async with serving() as station:
        caller = await station.associate(max_length=20)
        assert await caller.store(b"data") == 0
        await caller.release()


# ---- how associations end ----------------------------------------------------------------------------------

ENDINGS = {
    "abort": ABORT,
    "a lost connection": b"",
    "a second request": request(),
    "data in a context that was not accepted": data_pdu(pdv(9, 0, b"x")),
    "a command within the data set": data_pdu(pdv(3, 3, store_command())),
    "release": RELEASE_RQ,
}


@pytest.mark.parametrize("name", ENDINGS)
async def test_an_object_whose_association_ends_in_its_middle_is_abandoned(name: str) -> None:
    async with serving() as station:
        caller = await station.associate()
        caller.send(data_pdu(pdv(3, 3, store_command())) + data_pdu(pdv(3, 0, b"half of it")))
        await until(lambda: station.archive.objects and station.archive.objects[0].data)
        if ENDINGS[name]:
            caller.send(ENDINGS[name])
        else:
            await caller.close()
        await station.archive.abandoned.wait()
        assert station.archive.stored() == []
        await until(lambda: station.server.stats()["open"] == 0)
        await caller.close()


async def test_an_object_that_was_whole_is_kept_though_the_sender_is_gone() -> None:
    async with serving() as station:
        caller = await station.associate()
        station.archive.may_finish.clear()
        caller.send(store_message(DATA))
        await station.archive.finishing.wait()
        caller.reset()
        await asyncio.sleep(0.02)
        assert station.server.stats()["open"] == 1, "it still takes room"
        station.archive.may_finish.set()
        await until(lambda: station.server.stats()["open"] == 0)
        assert station.archive.stored() == [DATA]
        assert not station.archive.objects[0].abandoned


async def test_an_unsolicited_response_aborts() -> None:
    async with serving() as station:
        caller = await station.associate()
        response = command_set(
            (0x0100, u16(0x8001)), (0x0120, u16(1)), (0x0800, u16(0x0101)), (0x0900, u16(0))
        )
        caller.send(data_pdu(pdv(3, 3, response)))
        assert await caller.closed() == abort(0, 0)


async def test_a_fault_of_the_handler_is_ours_and_ends_the_server() -> None:
    async with serving() as station:
        failed = asyncio.create_task(station.server.failed())
        caller = await station.associate()
        station.archive.broken = True
        caller.send(store_message(b"data"))
        with pytest.raises(ZeroDivisionError):
            await failed
        caller.reset()


# ---- who may in --------------------------------------------------------------------------------------------

RULES = (
    AcceptRule("CT1", ("127.0.0.1/32", "10.0.0.0/8")),
    AcceptRule("*", ("192.0.2.0/24", "2001:db8::/32")),
)

DECISIONS = [
    ("127.0.0.1", "CT1", "MEDFERRY", None),
    ("10.9.8.7", "CT1", "MEDFERRY", None),
    ("192.0.2.5", "ANYBODY", "MEDFERRY", None),
    ("2001:db8::1", "ANYBODY", "MEDFERRY", None),
    ("127.0.0.1", "CT2", "MEDFERRY", Rejection.CALLING_AE_TITLE),
    ("127.0.0.1", "ct1", "MEDFERRY", Rejection.CALLING_AE_TITLE),
    ("127.0.0.2", "CT1", "MEDFERRY", Rejection.CALLING_AE_TITLE),
    ("198.51.100.1", "*", "MEDFERRY", Rejection.CALLING_AE_TITLE),
    ("192.0.2.5", "", "MEDFERRY", Rejection.CALLING_AE_TITLE),
    ("127.0.0.1", "CT1", "OTHER", Rejection.CALLED_AE_TITLE),
    ("127.0.0.1", "CT1", "", Rejection.CALLED_AE_TITLE),
    ("198.51.100.1", "X", "OTHER", Rejection.CALLING_AE_TITLE),
]


@pytest.mark.parametrize(("address", "calling", "called", "expected"), DECISIONS)
def test_the_door_is_kept(address: str, calling: str, called: str, expected: Rejection | None) -> None:
    raw = bytearray(request())
    raw[10:26] = called.encode().ljust(16)
    raw[26:42] = calling.encode().ljust(16)
    door = Doorkeeper(Policy(ae_title="MEDFERRY ", accept=RULES))
    assert door.decide(address, decode_request(bytes(raw[6:]))) is expected


def test_nobody_is_let_in_without_a_rule() -> None:
    door = Doorkeeper(Policy(ae_title="MEDFERRY", accept=()))
    assert door.decide("127.0.0.1", decode_request(request()[6:])) is Rejection.CALLING_AE_TITLE


@pytest.mark.parametrize(
    ("host", "plain"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("fe80::1%lo", "fe80::1%lo"),
    ],
)
def test_addresses_are_named_as_rules_name_them(host: str, plain: str) -> None:
    assert plain_address(host) == plain


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(request(calling="STRANGER"), (1, 1, 3)), (request(called="WRONG"), (1, 1, 7))],
    ids=["calling", "called"],
)
async def test_a_rejection_says_which_title_was_wrong(asked: bytes, expected: tuple[int, int, int]) -> None:
    async with serving(accept=(AcceptRule("SENDER", ("127.0.0.0/8",)),)) as station:
        caller = await station.call()
        caller.send(asked)
        assert await caller.whole() == rejection(*expected)
        await caller.close()
        assert station.archive.peers == []


async def test_the_handler_may_refuse_an_association_as_transient() -> None:
    async with serving() as station:
        station.archive.refusal = Rejection.FULL
        caller = await station.call()
        caller.send(request())
        assert await caller.whole() == rejection(2, 3, 2)
        await caller.close()
        assert station.server.stats()["rejected"] == {"full": 1}


async def test_ipv6() -> None:
    try:
        async with serving("::1", accept=ANYONE) as station:
            caller = await station.associate()
            assert await caller.store(b"data") == 0
            assert station.archive.peers[0].address == "::1"
            await caller.release()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")


async def test_an_association_without_any_acceptable_context_is_accepted_all_the_same() -> None:
    async with serving() as station:
        caller = await station.associate((("1.2.3", [IMPLICIT]),))
        await caller.release()


# ---- limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["max_associations", "max_associations_per_address"])
async def test_associations_over_the_limit_are_refused_as_transient(limit: str) -> None:
    async with serving("127.0.0.1", **{limit: 2}) as station:
        first, second = await station.associate(), await station.associate()
        third = await station.call()
        third.send(request())
        assert await third.whole() == rejection(2, 3, 2)
        await third.close()
        await first.release()
        await until(lambda: station.server.stats()["open"] == 1)
        await (await station.associate()).release()
        await second.release()


async def test_idle_associations_and_unfinished_pdus_end() -> None:
    async with serving(idle_seconds=0.2, pdu_seconds=0.1) as station:
        idle, half = await station.associate(), await station.associate()
        half.send(echo_message()[:20])
        assert await half.closed() == abort(2, 0)
        assert await idle.closed() == abort(0, 0)
        assert station.server.stats()["aborted"] == 2


async def test_an_association_does_not_idle_while_it_waits_for_us() -> None:
    async with serving(idle_seconds=0.1, pdu_seconds=0.1) as station:
        caller = await station.associate()
        station.archive.may_finish.clear()
        caller.send(store_message(b"data") + echo_message()[:15])
        await station.archive.finishing.wait()
        await asyncio.sleep(0.4)
        station.archive.may_finish.set()
        assert (await caller.command()).status == 0
        caller.send(echo_message()[15:])
        assert (await caller.command()).status == 0
        await caller.release()


# ---- drain -------------------------------------------------------------------------------------------------


async def test_drain_answers_what_is_under_way_and_refuses_what_is_new() -> None:
    async with serving() as station:
        storing, halfway, idle = [await station.associate() for _ in range(3)]
        station.archive.may_finish.clear()
        storing.send(store_message(b"whole"))
        await station.archive.finishing.wait()
        halfway.send(data_pdu(pdv(3, 3, store_command())) + data_pdu(pdv(3, 0, b"ha")))
        await until(lambda: len(station.archive.objects) == 2)
        draining = asyncio.create_task(station.server.drain(5))
        assert await idle.closed() == abort(0, 0)
        late = await station.call()
        late.send(request())
        assert await late.whole() == rejection(2, 3, 1)
        await late.close()
        halfway.send(data_pdu(pdv(3, 2, b"lf")))
        station.archive.may_finish.set()
        for caller in (storing, halfway):
            assert (await caller.command()).status == 0
            assert await caller.closed() == abort(0, 0)
        await draining
        assert sorted(station.archive.stored()) == [b"half", b"whole"]
        with pytest.raises(OSError):
            caller = await station.call()
            caller.send(request())
            await caller.pdu()


async def test_drain_ends_in_time_whoever_does_not() -> None:
    async with serving() as station:
        caller = await station.associate()
        caller.send(data_pdu(pdv(3, 3, store_command())) + data_pdu(pdv(3, 0, b"ha")))
        await until(lambda: station.archive.objects)
        async with asyncio.timeout(1):
            await station.server.drain(0.05)
        assert await caller.closed() == abort(0, 0)
        assert station.archive.objects[0].abandoned


async def test_a_server_is_closed_when_its_last_connection_is() -> None:
    async with serving() as station:
        stranger, caller = await station.call(), await station.associate()
        await until(lambda: len(station.server._connected) == 2)
        station.server.close()
        closed = asyncio.create_task(station.server.closed())
        await stranger.closed()
        assert await caller.whole() == abort(0, 0)
        assert not closed.done(), "the caller has not closed its end"
        await caller.close()
        async with asyncio.timeout(SECONDS):
            await closed
        assert not station.server._connected


async def test_who_is_accepted_while_the_server_closes_is_sent_away() -> None:
    async with serving() as station:
        station.server.close()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            theirs = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
        with theirs:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: Acceptor(station.server), ours)
            async with asyncio.timeout(SECONDS):
                await station.server.closed()
            assert theirs.recv(1000) == b""


async def test_an_association_is_aborted_once_however_its_connection_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The drain's end meets connections that wait for their peers to close: their associations are over."""
    async with serving() as station:
        await station.associate()
        released = await station.associate()
        released.send(RELEASE_RQ)
        await until(lambda: station.server.stats()["released"] == 1)
        await station.server.drain(1)
        stats = station.server.stats()
    assert (stats["open"], stats["aborted"], stats["released"]) == (0, 1, 1)
    told = [record for record in caplog.records if "aborted" in record.getMessage()]
    assert len(told) == 1


async def test_reprs_and_logs_tell_the_state_and_hold_no_object(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        async with serving() as station:
            caller = await station.associate()
            [acceptor] = station.server._established
            assert repr(acceptor) == "<Acceptor SENDER at 127.0.0.1 (association 1) Sta6>"
            assert repr(station.server) == "<Server MEDFERRY serving associations=1>"
            assert await caller.store(b"PATIENT^NAME") == 0
            await caller.release()
    assert "SENDER" in caplog.text
    assert "PATIENT" not in caplog.text and "2.25.1234567890" not in caplog.text
    with contextlib.suppress(ConnectionError):
        await caller.close()
