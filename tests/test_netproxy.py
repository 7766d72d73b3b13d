"""The bad network does what it was asked to do, and only that."""

from __future__ import annotations

import asyncio
import itertools
import socket

import pytest

from tests.netproxy import MAX_CLIENTS, QUEUE_SECONDS, Impairer, Impairment, UdpProxy


def fates(
    impairment: Impairment, count: int = 10_000, seed: int = 3, gap: float = 0.001
) -> list[list[float]]:
    impairer = Impairer(impairment, seed)
    return [impairer.departures(number * gap, 1000) for number in range(count)]


def test_a_good_network_passes_everything_at_once() -> None:
    assert fates(Impairment(), 100) == [[number * 0.001] for number in range(100)]


def test_same_seed_same_fate() -> None:
    rule = Impairment(drop=0.1, burst=0.01, jitter=0.02, reorder=0.05)
    assert fates(rule, seed=1) == fates(rule, seed=1)
    assert fates(rule, seed=1) != fates(rule, seed=2)


def test_drop_is_the_asked_share() -> None:
    lost = sum(not fate for fate in fates(Impairment(drop=0.05)))
    assert 400 < lost < 600


def test_bursts_have_their_length() -> None:
    text = "".join("-" if not fate else " " for fate in fates(Impairment(burst=0.001, burst_length=12)))
    runs = text.split()
    assert runs
    assert all(len(run) % 12 == 0 for run in runs)


def test_delay_and_jitter_keep_the_order() -> None:
    times = [fate[0] for fate in fates(Impairment(delay=0.05, jitter=0.03))]
    assert times == sorted(times)
    assert all(0.05 <= time - number * 0.001 <= 0.081 for number, time in enumerate(times))


def test_reordered_ones_are_overtaken() -> None:
    times = [fate[0] for fate in fates(Impairment(reorder=0.1, reorder_hold=0.0025))]
    overtaken = sum(after < before for before, after in itertools.pairwise(times))
    assert 800 < overtaken < 1200


def test_duplicates() -> None:
    assert 80 < sum(len(fate) == 2 for fate in fates(Impairment(duplicate=0.01))) < 120


def test_rate_limit_spaces_and_then_drops_the_tail() -> None:
    impairer = Impairer(Impairment(rate=8_000_000))
    burst = [impairer.departures(0.0, 1000) for _ in range(400)]
    times = [fate[0] for fate in burst if fate]
    assert times[:3] == pytest.approx([0.001, 0.002, 0.003])
    assert times[-1] == pytest.approx(QUEUE_SECONDS, abs=0.0011)
    assert impairer.counters.overflowed == len(burst) - len(times) > 0


def test_the_queue_of_the_rate_limit_is_bounded_and_drains() -> None:
    impairer = Impairer(Impairment(rate=1_000_000))
    arrivals = [at for at in (0.0, 0.001, 1.0) for _ in range(60)]
    fates_ = [(at, impairer.departures(at, 1250)) for at in arrivals]
    waits = [fate[0] - at for at, fate in fates_ if fate]
    assert max(waits) <= QUEUE_SECONDS + 0.011, "one datagram beyond what the queue holds"
    assert impairer.counters.overflowed == len(arrivals) - len(waits) > 0
    assert impairer.departures(3.0, 1250) == [pytest.approx(3.01)]


def test_a_rule_that_changes_holds_for_what_comes_next_with_the_same_luck() -> None:
    before, after = Impairment(rate=4_000_000), Impairment(rate=1_000_000, delay=0.02)
    impairer = Impairer(before, seed=5)
    first = impairer.departures(0.0, 1250)
    impairer.impairment = after
    second = impairer.departures(0.0, 1250)
    assert first == [pytest.approx(0.0025)]
    assert second == [pytest.approx(0.0025 + 0.01 + 0.02)], "behind what is on the link already, and slower"


@pytest.mark.parametrize(
    "rule",
    [
        Impairment(drop=0.2),
        Impairment(burst=0.02, burst_length=5),
        Impairment(delay=0.01, jitter=0.05),
        Impairment(reorder=0.2),
        Impairment(duplicate=0.2),
        Impairment(rate=500_000),
        Impairment(drop=0.1, burst=0.01, delay=0.02, jitter=0.01, reorder=0.1, duplicate=0.1, rate=2_000_000),
    ],
    ids=str,
)
def test_every_rule_is_repeatable_by_its_seed_and_loses_nothing_untold(rule: Impairment) -> None:
    impairer = Impairer(rule, seed=9)
    once = [impairer.departures(number * 0.001, 1000) for number in range(2000)]
    assert once == fates(rule, 2000, seed=9)
    counters = impairer.counters
    assert counters.received == 2000 == counters.forwarded + counters.dropped + counters.overflowed
    assert sum(map(len, once)) == counters.forwarded + counters.duplicated
    assert all(leaves >= number * 0.001 for number, fate in enumerate(once) for leaves in fate)


class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(data.upper(), addr)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_carries_both_ways_for_several_clients(host: str) -> None:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Echo, local_addr=(host, 0))
    async with UdpProxy(
        target=transport.get_extra_info("sockname")[:2], back=Impairment(delay=0.02)
    ) as proxy:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        clients = [socket.socket(family, socket.SOCK_DGRAM) for _ in range(3)]
        for number, client in enumerate(clients):
            client.setblocking(False)
            client.sendto(b"client %d" % number, proxy.address)
        started = loop.time()
        for number, client in enumerate(clients):
            async with asyncio.timeout(5):
                assert await loop.sock_recv(client, 100) == b"CLIENT %d" % number
        assert loop.time() - started >= 0.019
        for client in clients:
            client.close()
        assert (proxy.sent.forwarded, proxy.answered.forwarded) == (3, 3)
    transport.close()


async def test_strangers_beyond_the_limit_are_counted() -> None:
    async with UdpProxy(target=("127.0.0.1", 9)) as proxy:
        for number in range(MAX_CLIENTS + 5):
            proxy.datagram_received(b"x", ("127.0.0.1", 1000 + number))
        assert proxy.sent.strangers == 5
        assert proxy.sent.received == MAX_CLIENTS


async def test_a_rule_can_change_while_it_runs() -> None:
    async with UdpProxy(target=("127.0.0.1", 9)) as proxy:
        proxy.impair(forward=Impairment(drop=1.0))
        proxy.datagram_received(b"x", ("127.0.0.1", 1000))
        assert (proxy.sent.dropped, proxy.sent.forwarded) == (1, 0)


async def test_a_path_falls_and_recovers_while_it_runs() -> None:
    """Ten datagrams at once: at 80 kb/s the tenth takes a quarter of a second; without a limit, no time."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Echo, local_addr=("127.0.0.1", 0))
    target = transport.get_extra_info("sockname")[:2]

    async def exchange(proxy: UdpProxy, client: socket.socket) -> float:
        started = loop.time()
        for _ in range(10):
            client.sendto(bytes(250), proxy.address)
        async with asyncio.timeout(10):
            for _ in range(10):
                await loop.sock_recv(client, 1000)
        return loop.time() - started

    async with UdpProxy(target=target) as proxy:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            client.bind(("127.0.0.1", 0))
            quick = await exchange(proxy, client)
            proxy.impair(back=Impairment(rate=80_000))
            assert proxy.impairments == (Impairment(), Impairment(rate=80_000))
            slow = await exchange(proxy, client)
            proxy.impair(back=Impairment())
            again = await exchange(proxy, client)
    transport.close()
    assert quick < 0.2 > again
    assert slow >= 0.24
