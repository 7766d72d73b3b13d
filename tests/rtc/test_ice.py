"""ICE on this side: what is said when STUN and TURN servers fail. (The rest: see test_whip and test_whep.)"""

from __future__ import annotations

import asyncio
import logging
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from aioice import stun

from rtc.ice import IceSession, IceSettings

HERE = ("127.0.0.1",)
SECRET = "turn-secret-4711"


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IceSession, "_told", {})
    monkeypatch.setattr("rtc.ice.GATHER_SECONDS", 0.2)


async def gather(settings: IceSettings) -> IceSession:
    session = IceSession(settings, lambda *_: None)
    await session.gather_candidates()
    await session.close()
    return session


def turn(port: int, transport: str = "udp") -> IceSettings:
    return IceSettings(
        addresses=HERE,
        turn=("127.0.0.1", port),
        turn_transport=transport,
        turn_username="user-4711",
        turn_password=SECRET,
    )


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_turn_server_that_is_silent_is_told_once_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        for _ in range(3):
            await gather(turn(port))
        line = f"TURN server 127.0.0.1:{port}: no answer within 0.2 s: sessions go without it"
        assert told(caplog) == [line]
        monkeypatch.setattr("rtc.ice.TELL_SECONDS", 0.0)
        await gather(turn(port))
        assert told(caplog) == [line, line]


async def test_each_server_has_its_own_line(caplog: pytest.LogCaptureFixture) -> None:
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            ports.append(closed.getsockname()[1])
    for port in ports:
        await gather(turn(port, "tcp"))
    assert told(caplog) == [
        f"TURN server 127.0.0.1:{port}: Connection refused: sessions go without it" for port in ports
    ]


async def test_a_refusal_names_its_code_and_no_credential(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: Any) -> None:
            asked = stun.parse_message(data)
            answer = stun.Message(
                message_method=asked.message_method,
                message_class=stun.Class.ERROR,
                transaction_id=asked.transaction_id,
            )
            answer.attributes["ERROR-CODE"] = (403, f"Forbidden {SECRET}")
            self.transport.sendto(bytes(answer), addr)

    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Refusing, local_addr=("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]
    await gather(turn(port))
    transport.close()
    assert told(caplog) == [f"TURN server 127.0.0.1:{port}: refused with code 403: sessions go without it"]


async def test_a_stun_server_is_told_only_where_no_address_got_an_answer(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = [OSError(101, "Network is unreachable"), None]

    async def reflexive(protocol: Any, server: Any) -> Any:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome
        return protocol.local_candidate, None

    monkeypatch.setattr("rtc.ice.server_reflexive_candidate", reflexive)
    monkeypatch.setattr("rtc.ice._may_be_reflexive", lambda host: True)
    settings = IceSettings(addresses=("127.0.0.1", "127.0.0.2"), stun=("127.0.0.1", 3478))
    await gather(settings)
    assert told(caplog) == []
    outcomes += [OSError(101, "x"), OSError(101, "x")]
    await gather(settings)
    assert told(caplog) == ["STUN server 127.0.0.1:3478: Network is unreachable: sessions go without it"]


class Peer:
    """Answers consent checks, but for those whose numbers are lost; they end as aioice ends them."""

    def __init__(self, lost: range) -> None:
        self.lost = lost
        self.asked = 0

    async def request(self, *_: Any, **__: Any) -> None:
        self.asked += 1
        if self.asked - 1 in self.lost:
            await asyncio.sleep(0.5)
            raise stun.TransactionTimeout
        await asyncio.sleep(0.01)


async def ask(monkeypatch: pytest.MonkeyPatch, peer: Peer, seconds: float) -> bool:
    """Ask `peer` for its consent for so long; whether it was given up meanwhile."""
    session = IceSession(IceSettings(addresses=HERE), lambda *_: None)
    session.remote_password = "password"
    pair: Any = SimpleNamespace(protocol=peer, remote_addr=("127.0.0.1", 9))
    session._nominated = {1: pair}
    monkeypatch.setattr(session, "build_request", lambda *_, **__: None)
    asking = asyncio.create_task(session.query_consent())
    done, _ = await asyncio.wait({asking}, timeout=seconds)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert len(asyncio.all_tasks()) == 1, "no check is left behind"
    return bool(done)


async def test_who_answers_is_asked_twice_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(range(0))
    assert not await ask(monkeypatch, peer, 2.0)
    assert 3 <= peer.asked <= 5


async def test_a_few_checks_lost_in_a_row_are_no_reason_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(range(1, 8))
    assert not await ask(monkeypatch, peer, 3.5)
    assert peer.asked > 9


async def test_who_answers_no_more_is_gone_within_three_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await ask(monkeypatch, Peer(range(1, 1000)), 3.0)
