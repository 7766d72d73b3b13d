"""The configuration file: every key of the contract, every problem at once, in words that help."""

from __future__ import annotations

from pathlib import Path

import pytest

from relay import config
from relay.config import Listener, split_address
from relay.errors import ConfigError

CONTRACT = """
[relay]
name  = "edge-1"
state = "./medferry-state"

[[lane]]
name  = "studies"
kind  = "dicom"
lab   = true
[lane.source]
listen   = "127.0.0.1:11112"
ae_title = "MEDFERRY"
accept   = [ { ae_title = "*", from = ["127.0.0.0/8"] } ]
[lane.sink]
ae_title = "MEDFERRY"
[[lane.sink.destination]]
name = "pacs"
ae_title = "PACS"
address  = "127.0.0.1:11113"

[[lane]]
name = "camera"
kind = "media"
lab  = true
[lane.source.rtp]
listen = "127.0.0.1:5004"
codec  = "h264"
[lane.source.whip]
listen = "127.0.0.1:8081"
[lane.sink.rtp]
address = "127.0.0.1:5006"
codec   = "h264"
bitrate = 4_000_000
[lane.sink.whep]
listen = "127.0.0.1:8082"
"""


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.parse(text)
    return caught.value.problems


def changed(old: str, new: str, text: str = CONTRACT) -> str:
    assert old in text
    return text.replace(old, new, 1)


def test_every_key_of_the_contract_is_known() -> None:
    read = config.parse(CONTRACT)
    assert (read.relay.name, read.relay.state) == ("edge-1", "./medferry-state")
    assert [(lane.name, lane.kind, lane.lab) for lane in read.lanes] == [
        ("studies", "dicom", True),
        ("camera", "media", True),
    ]
    listening = [listener for lane in read.lanes for listener in lane.source.listeners()]
    assert {item.address for item in listening} >= {"127.0.0.1:11112", "127.0.0.1:5004", "127.0.0.1:8081"}
    assert [item.address for item in read.lanes[1].sink.listeners()] == ["127.0.0.1:8082"]


def test_what_was_read_cannot_be_changed() -> None:
    read = config.parse(CONTRACT)
    with pytest.raises(ValueError, match="frozen"):
        read.relay.name = "other"


def test_two_readings_of_one_file_are_equal_and_of_two_are_not() -> None:
    """A reload leaves those lanes alone that are equal."""
    one, two = config.parse(CONTRACT), config.parse(changed("4_000_000", "5_000_000"))
    assert one == config.parse(CONTRACT)
    assert one.lanes[0] == two.lanes[0]
    assert one.lanes[1] != two.lanes[1]


WRONG: list[tuple[str, str, str]] = [
    ('name  = "edge-1"', 'nmae = "edge-1"', "relay.nmae: unknown key: write 'name'"),
    ('name  = "edge-1"', "", "relay.name: missing: add this key"),
    ('name  = "edge-1"', 'name = "Edge 1"', "relay.name: has characters that may not be there: write what"),
    ('name  = "edge-1"', "name = 1", "relay.name: not what belongs here: write a valid string"),
    ('"edge-1"', '"edge-1"\ndrain_seconds = 0', "relay.drain_seconds: not what belongs here: write greater"),
    ('"edge-1"', '"edge-1"\ndrain_seconds = 1e9', "relay.drain_seconds: not what belongs here: write less"),
    ('"edge-1"', '"edge-1"\nuid_base = 0', "relay.uid_base: not what belongs here"),
    ("[relay]", "[relais]", "relais: unknown table: the tables are [relay] and [[lane]]"),
    ('kind  = "dicom"', 'kind = "dcm"', "lane 'studies'.kind: 'dcm': write one of dicom, media"),
    ('kind  = "dicom"', "", "lane 'studies'.kind: None: write one of dicom, media"),
    ('kind  = "dicom"', 'kind = ["dicom"]', "lane 'studies'.kind: ['dicom']: write one of dicom, media"),
    ('name  = "studies"', "", "lane '?'.name: missing: add this key"),
    (
        'listen   = "127.0.0.1:11112"',
        'lissten = "127.0.0.1:11112"',
        "lane 'studies'.source.lissten: unknown key",
    ),
    (
        'listen   = "127.0.0.1:11112"',
        'listen = "127.0.0.1"',
        "lane 'studies'.source.listen: '127.0.0.1' has no port",
    ),
    (
        'listen   = "127.0.0.1:11112"',
        'listen = "127.0.0.1:99999"',
        "lane 'studies'.source.listen: port 99999",
    ),
    ('listen   = "127.0.0.1:11112"', 'listen = "::1:11112"', "write an IPv6 address in brackets"),
    ('listen   = "127.0.0.1:11112"', 'listen = "[::g]:11112"', "lane 'studies'.source.listen: "),
    (
        "bitrate = 4_000_000",
        'bitrate = "fast"',
        "lane 'camera'.sink.rtp.bitrate: not what belongs here: write",
    ),
    (
        'name = "camera"',
        'name = "studies"',
        "lane 'studies': second lane of this name: give each lane its own",
    ),
    (
        "127.0.0.1:8081",
        "127.0.0.1:11112",
        "127.0.0.1:11112 is taken by lane 'studies'.source: choose another",
    ),
    ('"./medferry-state"', '""', "relay.state: this names no directory: write a path"),
    ('"./medferry-state"', '"a\\u0000b"', "relay.state: this names no directory: write a path"),
    ("lab   = true", 'lab = "yes"', "lane 'studies'.lab: not what belongs here: write true or false"),
    (
        'ae_title = "MEDFERRY"',
        'ae_title = "MEDFERRY"\nmax_associations = true',
        "lane 'studies'.source.max_associations: not what belongs here: write a value, not true or false",
    ),
    ("lab   = true", "lab = 1", "lane 'studies'.lab: not what belongs here: write true or false"),
    ('ae_title = "*", from', 'ae_title = "*", frm', "accept[0].frm: unknown key: write 'from'"),
    ('[ { ae_title = "*", from = ["127.0.0.0/8"] } ]', '"*"', "accept: not what belongs here: write a list"),
    ("127.0.0.1:5004", "127.0.0.1:70000", "source.rtp.listen: port 70000 is outside 0 to 65535"),
]


@pytest.mark.parametrize(("old", "new", "expected"), WRONG)
def test_one_mistake_is_told_with_what_to_write(old: str, new: str, expected: str) -> None:
    found = problems(changed(old, new))
    assert any(expected in problem for problem in found), found


@pytest.mark.parametrize(("old", "new", "expected"), WRONG)
def test_every_problem_has_where_what_and_what_to_write(old: str, new: str, expected: str) -> None:
    for problem in problems(changed(old, new)):
        where, _, rest = problem.partition(": ")
        assert where and rest, problem
        assert "Input should" not in problem
        assert "\n" not in problem


def test_all_mistakes_are_told_at_once() -> None:
    text = CONTRACT
    for old, new, _ in (WRONG[0], WRONG[8], WRONG[17]):
        text = changed(old, new, text)
    found = "\n".join(problems(text))
    assert all(part in found for part in ("nmae", "'dcm'", "bitrate"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "lane: no lane: add at least one [[lane]] table"),
        ("lane = 3", "lane: no lane"),
        ("lane = [1, 2]", "lane: no lane"),
        ('[lane]\nname = "a"', "lane: no lane: add at least one [[lane]] table (with two brackets)"),
        ("relay = 3", "relay: "),
        ("[relay", "not TOML: "),
        (
            '[relay]\nname = "a"\n' + '[[lane]]\nkind = "dicom"\n' * 65,
            "lane: 65 lanes: at most 64 in one relay",
        ),
    ],
)
def test_a_file_that_is_no_configuration(text: str, expected: str) -> None:
    assert any(expected in problem for problem in problems(text))


def test_what_is_wrong_in_a_list_is_told_once() -> None:
    [problem] = problems(changed('from = ["127.0.0.0/8"]', 'from = ["hospital"]'))
    assert problem.startswith("lane 'studies'.source.accept[0].from[0]: ")


def test_a_file_from_another_system_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "relay.toml"
    file.write_text(CONTRACT, encoding="utf-8-sig")
    assert config.read(str(file)) == config.parse(CONTRACT)


def test_each_problem_of_a_file_begins_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "relay.toml"
    for text in ("[relay", CONTRACT.replace("dicom", "dcm")):
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            config.read(str(file))
        assert all(
            each.count(str(file)) == 1 and each.startswith(str(file)) for each in caught.value.problems
        )


def test_files_that_cannot_be_read_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_text("x")
    keys = f'tls_certificate = "{tmp_path}/a.pem"\ntls_key = "{tmp_path}/b.pem"\n'
    text = changed(
        '[lane.sink.whep]\nlisten = "127.0.0.1:8082"\n',
        '[lane.sink.whep]\nlisten = "127.0.0.1:8082"\n' + keys,
    )
    [problem] = config.unreadable(config.parse(text))
    assert problem == f"lane 'camera'.sink: {tmp_path}/b.pem: No such file or directory: name a readable file"


def test_a_secret_in_the_wrong_place_is_not_shown() -> None:
    text = changed('name  = "edge-1"', 'name = "edge-1"\ndrain_seconds = "hunter2"')
    assert "hunter2" not in "".join(problems(text))


def test_the_same_port_in_another_namespace_or_protocol_is_no_collision() -> None:
    tcp_and_udp = changed("127.0.0.1:8081", "127.0.0.1:5004")
    assert config.parse(tcp_and_udp)
    apart = changed("127.0.0.1:8081", "127.0.0.1:11112")
    apart = changed("[lane.source.rtp]", '[lane.source]\nnetns = "camera-net"\n[lane.source.rtp]', apart)
    assert config.parse(apart).lanes[1].source.netns == "camera-net"


@pytest.mark.parametrize("netns", ["", "../etc", "a b", "x" * 65])
def test_a_namespace_has_a_plain_name(netns: str) -> None:
    text = changed("[lane.source]\n", f'[lane.source]\nnetns = "{netns}"\n')
    assert any("netns" in problem for problem in problems(text))


def test_port_0_may_be_listened_on_twice() -> None:
    text = changed("127.0.0.1:8081", "127.0.0.1:0")
    assert config.parse(changed("127.0.0.1:8082", "127.0.0.1:0", text))


def test_each_side_may_serve_metrics() -> None:
    text = changed("[lane.source]\n", '[lane.source]\nmetrics = "127.0.0.1:9100"\n')
    assert (
        Listener(name="metrics", address="127.0.0.1:9100", kind="tcp")
        in config.parse(text).lanes[0].source.listeners()
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:11112", ("::1", 11112)),
        ("[fe80::1]:65535", ("fe80::1", 65535)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert split_address(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        ":80",
        "host",
        "host:",
        "host:x",
        "host:-1",
        "::1:80",
        "[::1]",
        "a b:1",
        "h:¹",
        "a..b:1",
        f"{'a' * 64}:1",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=": write "):
        split_address(text)


def test_reading_a_file(tmp_path: Path) -> None:
    good = tmp_path / "good.toml"
    good.write_text(CONTRACT)
    assert config.read(str(good)) == config.parse(CONTRACT)
    large, foreign = tmp_path / "large.toml", tmp_path / "foreign.toml"
    large.write_bytes(b"#" * (config.MAX_CONFIG_BYTES + 1))
    foreign.write_bytes(b"# caf\xe9\n")
    for path, reason in (
        (tmp_path / "absent.toml", "No such file or directory: name a readable file"),
        (tmp_path, "Is a directory"),
        (large, "over 1048576 bytes"),
        (foreign, "not UTF-8: save it as UTF-8"),
    ):
        with pytest.raises(ConfigError, match=reason):
            config.read(str(path))
