"""The one configuration file: TOML in, frozen models out.

Every model forbids keys it does not know, and every problem of a file is reported at once, each as
``where: what is wrong: what to write instead``. The tables that differ by kind of lane live with that kind
(`dicom.settings`, `rtc.settings`) and derive from the models here.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import socket
import tomllib
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, field_validator

from relay.errors import ConfigError
from relay.lanes import LANE_KINDS, load

MAX_CONFIG_BYTES = 1 << 20
"""A configuration file larger than this is a mistake."""

MAX_LANES = 64
"""Lanes of one relay: three processes each, so far below any limit of the machine."""


def _address(text: str) -> str:
    _, port = split_address(text)
    if port > 65535:
        raise ValueError(f"port {port} is outside 0 to 65535: choose another")
    return text


def _directory(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("this names no directory: write a path, as in /var/lib/medferry")
    return text


def split_address(text: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port`` in two parts. The host must be an IP address or a host name.

    Raises:
        ValueError: `text` has no port, or a bare IPv6 address.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port):
        raise ValueError(f"{text!r} has no port: write host:port, as in 127.0.0.1:11112 or [::1]:11112")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ipaddress.AddressValueError as error:
            raise ValueError(f"{error}: write an IPv6 address in brackets, as in [::1]:11112") from None
    elif ":" in host:
        raise ValueError(f"{text!r}: write an IPv6 address in brackets, as in [::1]:11112")
    elif not re.fullmatch(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*", host):
        raise ValueError(f"{text!r} has no possible host: write host:port, as in 127.0.0.1:11112")
    return host, int(port)


Address = Annotated[str, AfterValidator(_address)]
"""``host:port``; IPv6 in brackets."""

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$")]
"""What operators call a thing: 1 to 32 of a-z, 0-9 and inner hyphens."""


class Settings(BaseModel):
    """Base of every table: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_is_a_number(cls, value: object, info: pydantic.ValidationInfo) -> object:
        """Pydantic would read `true` as 1."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("not what belongs here: write a value, not true or false")
        return value


class Listener(Settings):
    """A socket that the supervisor opens for a worker, in the worker's network namespace.

    It outlives the worker: while a source restarts, new connections wait in the backlog.
    """

    name: str
    address: str
    kind: Literal["tcp", "udp"]

    @property
    def type(self) -> socket.SocketKind:
        return socket.SOCK_STREAM if self.kind == "tcp" else socket.SOCK_DGRAM


class SideSettings(Settings):
    """What both sides of any lane share."""

    netns: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    """Network namespace (as `ip netns` names it) that this side's process lives in. Needs root."""

    metrics: Address | None = None
    """Where this side serves Prometheus metrics at /metrics. Each side has its own, on its own network."""

    def listeners(self) -> list[Listener]:
        """The sockets this side listens on; subclasses add theirs to the base's."""
        return [Listener(name="metrics", address=self.metrics, kind="tcp")] if self.metrics else []

    def files(self) -> list[str]:
        """Files (keys, certificates) that the worker reads though its uid may not; see `worker.Side.file`."""
        return []


class LaneSettings(Settings):
    """One ``[[lane]]``. Kinds narrow `source` and `sink`."""

    name: Name
    kind: str
    lab: StrictBool = False
    """Plaintext and wildcard peers are allowed. Never for patient data."""
    link_bytes_per_second: Annotated[int, Field(ge=0, le=100_000_000_000)] = 0
    """Most that the valve lets pass, 0 for no limit."""
    source: SideSettings
    sink: SideSettings


class RelaySettings(Settings):
    """The ``[relay]`` table."""

    name: Name
    state: Annotated[str, AfterValidator(_directory)] = "./medferry-state"
    """Directory of spools and quarantine. Relative to the directory medferry is started in."""
    drain_seconds: Annotated[float, Field(ge=1, le=600)] = 20.0
    """After SIGTERM the relay has ended within this time; what is undelivered by then waits in the spool."""
    separate_users: StrictBool = True
    """As root, give each side its own uid. Ignored, and said so in status, without root."""
    uid_base: Annotated[int, Field(ge=1000, le=2**31)] = 61_184
    """First uid of those given to workers: source, valve and sink of the first lane get base, base+1, base+2,
    those of the next lane the three after that."""


class Config(Settings):
    """A whole file. `lanes` holds the kind's own model for each lane."""

    relay: RelaySettings
    lanes: tuple[LaneSettings, ...]


def _where(lane: dict[str, Any] | None, location: tuple[int | str, ...]) -> str:
    keys = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    prefix = "relay" if lane is None else f"lane {lane.get('name', '?')!r}"
    return prefix + "".join(keys)


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that the table at `location` knows, for "did you mean"."""
    current: Any = model
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part) if hasattr(current, "model_fields") else None
        if field is None:
            return []
        current = _model_of(field.annotation)
    if not hasattr(current, "model_fields"):
        return []
    return [field.alias or name for name, field in current.model_fields.items()]


def _model_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_of(inner)
        if found is not None:
            return found
    return None


def _problems(
    model: type[BaseModel], error: pydantic.ValidationError, lane: dict[str, Any] | None
) -> list[str]:
    problems = []
    items = error.errors(include_url=False)
    for item in items:
        location = item["loc"]
        if item["type"] == "too_short" and any(
            len(other["loc"]) > len(location) and other["loc"][: len(location)] == location for other in items
        ):
            # What is wrong in a list leaves the list short, too.
            continue
        where = _where(lane, location)
        if item["type"] == "extra_forbidden":
            known = _known_keys(model, location)
            close = difflib.get_close_matches(str(location[-1]), known, n=1)
            hint = f"write {close[0]!r}" if close else f"known keys are {', '.join(sorted(known)) or 'none'}"
            problems.append(f"{where}: unknown key: {hint}")
        elif item["type"] == "missing":
            problems.append(f"{where}: missing: add this key")
        else:
            problems.append(f"{where}: {_advice(item['msg'])}")
    return problems


def _advice(message: str) -> str:
    """A validator's message as ``what: what to write``. The value itself is not shown: it may be a secret."""
    own = message.removeprefix("Value error, ")
    if own != message:
        return own
    for beginning, (what, write) in _PHRASES.items():
        if message.startswith(beginning):
            rest = message.removeprefix(beginning) if write == "" or write.endswith(" ") else ""
            return f"{what}: write {write}{rest}"
    return f"cannot be used: {message[0].lower()}{message[1:]}"


_PHRASES = {
    "Input should be a valid dictionary": ("not what belongs here", "a table"),
    "Input should be a valid tuple": ("not what belongs here", "a list, in [ and ]"),
    "Input should be a valid boolean": ("not what belongs here", "true or false"),
    "Input should be ": ("not what belongs here", ""),
    "String should match pattern ": ("has characters that may not be there", "what matches "),
    "String should have ": ("wrong length", "a text of "),
    "List should have ": ("wrong number of items", "a list of "),
    "Tuple should have ": ("wrong number of items", "a list of "),
}
"""How pydantic's messages begin, and what is wrong then."""


def parse(text: str) -> Config:
    """Turn the text of a configuration file into a `Config`.

    Raises:
        ConfigError: With every problem found, not just the first.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"not TOML: {error}: check quotes, brackets and = signs there"]) from None
    problems: list[str] = []
    for key in sorted(data.keys() - {"relay", "lane"}):
        problems.append(f"{key}: unknown table: the tables are [relay] and [[lane]]")
    relay: RelaySettings | None = None
    try:
        relay = RelaySettings.model_validate(data.get("relay", {}))
    except pydantic.ValidationError as error:
        problems += _problems(RelaySettings, error, None)
    lanes: list[LaneSettings] = []
    tables = data.get("lane", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(item, dict) for item in tables):
        problems.append("lane: no lane: add at least one [[lane]] table (with two brackets)")
        tables = []
    if len(tables) > MAX_LANES:
        problems.append(f"lane: {len(tables)} lanes: at most {MAX_LANES} in one relay")
        tables = []
    for table in tables:
        kind = table.get("kind")
        if not isinstance(kind, str) or kind not in LANE_KINDS:
            problems.append(f"{_where(table, ('kind',))}: {kind!r}: write one of {', '.join(LANE_KINDS)}")
            continue
        model: type[LaneSettings] = load(LANE_KINDS[kind].settings)
        try:
            lanes.append(model.model_validate(table))
        except pydantic.ValidationError as error:
            problems += _problems(model, error, table)
    problems += _collisions(lanes)
    if problems or relay is None:
        raise ConfigError(problems)
    return Config(relay=relay, lanes=tuple(lanes))


def _collisions(lanes: list[LaneSettings]) -> list[str]:
    """Names and listening addresses that two places claim."""
    problems = []
    names: set[str] = set()
    claimed: dict[tuple[str | None, str, str], str] = {}
    for lane in lanes:
        if lane.name in names:
            problems.append(f"lane {lane.name!r}: second lane of this name: give each lane its own")
        names.add(lane.name)
        for side_name, side in (("source", lane.source), ("sink", lane.sink)):
            for listener in side.listeners():
                if listener.address.endswith(":0"):
                    continue
                key = (side.netns, listener.kind, listener.address)
                here = f"lane {lane.name!r}.{side_name}"
                if key in claimed:
                    problems.append(
                        f"{here}: {listener.address} is taken by {claimed[key]}: choose another port"
                    )
                claimed.setdefault(key, here)
    return problems


def read(path: str) -> Config:
    """Read and check a configuration file.

    Raises:
        ConfigError: The file cannot be read or is wrong; each problem begins with `path`.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"{path}: {os.strerror(error.errno or 0)}: name a readable file"]) from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError([f"{path}: over {MAX_CONFIG_BYTES} bytes: this is no configuration file"])
    try:
        return parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ConfigError([f"{path}: not UTF-8: save it as UTF-8"]) from None
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None


def unreadable(config: Config) -> list[str]:
    """What is wrong with the files that `config` names, as far as this user can tell by opening them."""
    problems = []
    for lane in config.lanes:
        for name, side in (("source", lane.source), ("sink", lane.sink)):
            for path in side.files():
                try:
                    with open(path, "rb") as file:
                        file.read(1)
                except OSError as error:
                    reason = os.strerror(error.errno or 0)
                    problems.append(f"lane {lane.name!r}.{name}: {path}: {reason}: name a readable file")
    return problems
