"""`kill -9` of the running product's processes, supervisor included, while senders store.

What a sender was told is safe (status 0x0000) is in the archive at the end with the very bytes that were
sent. A sender that got no answer sends again, as modalities do; the archive may therefore see an object
twice, but never another one.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perf.client import Client, NotUnderstood
from relay.errors import MedferryError
from relay.spool_admin import SpoolAdmin
from relay.spool_types import DeliveryState
from relay.supervisor import ask
from tests.archive import Archive, Made, made
from tests.dicom.datasets import CT, EXPLICIT
from tests.peers import free_port
from tests.product import Product, running, studies

pytestmark = pytest.mark.filterwarnings(
    # The archive's pynetdicom drops the socket of a sink that was killed without closing it.
    "ignore:.*unclosed.*:pytest.PytestUnraisableExceptionWarning",
    "ignore:.*unclosed.*:ResourceWarning",
    r"ignore:Exception ignored in. <socket.*:pytest.PytestUnraisableExceptionWarning",
)

VICTIMS = ("source", "valve", "sink", "supervisor")

SIZES = (1_000, 1_000, 1_000, 60_000, 60_000, 400_000, 3_000_000)
"""Of objects: one fragment, a few, and so many that a kill finds one half way."""

RETRY_SECONDS = 0.05
"""A sender's pause after an association that failed."""

UP_SECONDS = 30.0
"""In which what was killed has to be back."""


class Sender(threading.Thread):
    """Stores one object after the other and keeps at each until it is answered with success."""

    def __init__(self, number: int, address: tuple[str, int]) -> None:
        super().__init__(name=f"sender {number}")
        self.address = address
        self.stopping = threading.Event()
        self.acknowledged: dict[str, str] = {}
        """SHA-256 by SOP Instance UID of what was answered with success."""
        self.failures = 0
        self._random = random.Random(number)
        self._objects = self._make(number)

    def _make(self, number: int) -> Iterator[Made]:
        count = 0
        while not self.stopping.is_set():
            yield made(number * 1_000_000 + count, self._random.choice(SIZES))
            count += 1

    def run(self) -> None:
        current = next(self._objects, None)
        while current is not None:
            try:
                with Client(self.address, "MEDFERRY", [(CT, [EXPLICIT])]) as client:
                    while current is not None:
                        if client.store(current.sop_class, current.uid, current.data) == 0x0000:
                            self.acknowledged[current.uid] = current.sha256
                            current = next(self._objects, None)
            except (OSError, NotUnderstood, struct.error):
                # What was acknowledged and lost its release, or never answered: both are told apart above.
                self.failures += 1
                if self.stopping.wait(RETRY_SECONDS):
                    return


class Victim:
    """The product, started again by whoever killed its supervisor."""

    def __init__(self, config: str, directory: Path) -> None:
        self._config = config
        self._directory = directory
        self._life = contextlib.ExitStack()
        self._logs: list[str] = []
        self.product = self._start()

    def _start(self) -> Product:
        return self._life.enter_context(running(self._config, self._directory, drain=False))

    def lane(self) -> dict[str, Any]:
        """What status says of the lane."""
        lane: dict[str, Any] = ask(str(self.product.state))["lanes"][0]
        return lane

    def kill(self, name: str) -> None:
        """SIGKILL to one process, at whatever it is doing."""
        if name == "supervisor":
            os.kill(self.product.process.pid, signal.SIGKILL)
            self.product.process.wait()
            self._life.close()
            self._logs.append(self.product.log)
            self.product = self._start()
            return
        pid = self.lane()[name]["pid"]
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_up(self) -> None:
        """Return once all three processes of the lane work again."""
        deadline = time.monotonic() + UP_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(MedferryError):
                if self.lane()["state"] == "running":
                    return
            threading.Event().wait(0.05)
        raise AssertionError(f"not running again after {UP_SECONDS:.0f} s:\n{self.product.log[-3000:]}")

    def log(self) -> str:
        """What all its lives printed."""
        return "".join([*self._logs, self.product.log])

    def close(self) -> None:
        self._life.close()


def carnage(tmp_path: Path, rounds: int, seed: int, settle_seconds: float) -> None:
    """Kill `rounds` times at random, then see what became of everything acknowledged."""
    print(f"seed {seed}")
    choice = random.Random(seed)
    port = free_port()
    with Archive() as pacs:
        config = studies(
            listen=f"127.0.0.1:{port}",
            destinations={"pacs": pacs.destination},
            sink="retry_seconds = 0.1\nmax_retry_seconds = 1",
        )
        victim = Victim(config, tmp_path)
        senders = [Sender(number, ("127.0.0.1", port)) for number in (1, 2)]
        try:
            for sender in senders:
                sender.start()
            # Each victim in turn, in an order of chance, then anyone, sometimes two at once.
            for turn in range(rounds):
                name = VICTIMS[turn] if turn < len(VICTIMS) else choice.choice(VICTIMS)
                threading.Event().wait(choice.uniform(0, 0.4))
                victim.kill(name)
                if choice.random() < 0.3:
                    victim.kill(choice.choice(VICTIMS[:3]))
                if choice.random() < 0.7:
                    victim.wait_up()
        finally:
            for sender in senders:
                sender.stopping.set()
            for sender in senders:
                sender.join()
        try:
            victim.wait_up()
            acknowledged = {uid: sha for sender in senders for uid, sha in sender.acknowledged.items()}
            assert len(acknowledged) > rounds
            pacs.wait(acknowledged, settle_seconds)
            for uid, sha256 in acknowledged.items():
                assert set(pacs.received[uid]) == {sha256}
            assert victim.product.terminate() == 0
            assert "never arrived" not in victim.log()
            for side in ("source", "sink"):
                with SpoolAdmin(str(tmp_path / "state" / "lanes" / "studies" / side / "spool")) as spool:
                    assert not spool.quarantine_ls()
                    assert not spool.ls(state=DeliveryState.WAITING)
                    assert not spool.ls(state=DeliveryState.PARKED)
        finally:
            victim.close()


def test_nothing_acknowledged_is_lost_when_processes_are_killed(tmp_path: Path) -> None:
    carnage(tmp_path, rounds=8, seed=int.from_bytes(os.urandom(4), "big"), settle_seconds=30)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_acknowledged_is_lost_in_two_hundred_kills(tmp_path: Path) -> None:
    rounds = int(os.environ.get("MEDFERRY_KILL_ROUNDS", "200"))
    carnage(tmp_path, rounds=rounds, seed=20261124, settle_seconds=120)
