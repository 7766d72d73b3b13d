"""The pages hold no script of their own, load nothing from elsewhere, and speak both languages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from rtc.pages import FILES, POLICY, Role, routes
from rtc.stamp import Stamp

ROLES: tuple[Role, ...] = ("source", "sink")


def text(name: str) -> str:
    return resources.files("rtc.pages").joinpath(name).read_text()


def words() -> dict[str, set[str]]:
    """Keys of each language in words.js."""
    found: dict[str, set[str]] = {}
    for line in text("words.js").splitlines():
        if opening := re.fullmatch(r"  (\w+): \{", line):
            current = found.setdefault(opening[1], set())
        elif entry := re.match(r'    (\w+): "', line):
            assert entry[1] not in current, f"{entry[1]} is there twice"
            current.add(entry[1])
    return found


class Tags(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


async def client(role: Role) -> TestClient[web.Request, web.Application]:
    application = web.Application()
    application.add_routes(routes(role))
    return TestClient(TestServer(application))


@pytest.mark.parametrize("role", ROLES)
async def test_every_file_is_served_under_the_policy(role: Role) -> None:
    index, *rest = FILES[role]
    async with await client(role) as session:
        for path, name in [("/", index), *((f"/pages/{name}", name) for name in rest)]:
            answer = await session.get(path)
            assert (answer.status, await answer.text()) == (200, text(name))
            assert answer.headers["Content-Security-Policy"] == POLICY
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            again = await session.get(path, headers={"If-None-Match": answer.headers["ETag"]})
            assert (again.status, await again.read()) == (304, b"")
        assert (await session.get("/pages/__init__.py")).status == 404
        assert (await session.get("/pages/..%2fsettings.py")).status == 404


@pytest.mark.parametrize(("role", "camera"), [("source", "camera=(self)"), ("sink", "camera=()")])
async def test_only_the_publish_page_may_ask_for_a_camera(role: Role, camera: str) -> None:
    async with await client(role) as session:
        assert camera in (await session.get("/")).headers["Permissions-Policy"]


def test_the_policy_allows_no_inline_script_and_no_other_host() -> None:
    assert "unsafe" not in POLICY
    assert "default-src 'none'" in POLICY
    assert "//" not in POLICY
    assert "*" not in POLICY


@pytest.mark.parametrize("role", ROLES)
def test_the_html_is_one_that_the_policy_lets_work(role: Role) -> None:
    served = {f"/pages/{name}" for name in FILES[role]}
    ids = set()
    for tag, attributes in Tags(text(FILES[role][0])).found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        if tag == "script":
            assert attributes["src"] in served
        if tag == "link" and attributes["rel"] == "stylesheet":
            assert attributes["href"] in served
        if identifier := attributes.get("id"):
            assert identifier not in ids
            ids.add(identifier)
        for reference in ("for", "aria-describedby"):
            assert attributes.get(reference) is None or f'id="{attributes[reference]}"' in text(
                FILES[role][0]
            )
    used = set(re.findall(r'\$\("([\w-]+)"\)', text(FILES[role][0].replace(".html", ".js"))))
    assert used <= ids


@pytest.mark.parametrize("role", ROLES)
def test_scripts_import_only_what_this_role_serves(role: Role) -> None:
    for name in FILES[role]:
        if name.endswith(".js"):
            source = text(name)
            assert set(re.findall(r'from "\./([\w.]+)"', source)) <= set(FILES[role])
            assert "innerHTML" not in source
            assert "eval(" not in source
            assert not re.search(r"https?://", source)


def test_both_languages_have_the_same_words() -> None:
    found = words()
    assert set(found) == {"en", "zh"}
    assert found["en"] == found["zh"]
    assert len(found["en"]) > 50


def test_every_word_that_is_used_exists_and_every_word_is_used() -> None:
    known = words()["en"]
    used: set[str] = set()
    scripts = ""
    for name in {name for names in FILES.values() for name in names}:
        source = text(name)
        if name.endswith(".html"):
            used |= set(re.findall(r'data-(?:word|label|title)="(\w+)"', source))
        elif name.endswith(".js") and name != "words.js":
            scripts += source
    assert used <= known
    quoted = set(re.findall(r'"(\w+)"', scripts))
    assert known <= used | quoted, known - used - quoted


def run_script(module: str, script: str) -> object:
    """What `script` prints, as JSON; ``%s`` in it is the address of one of the pages' modules."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: apt-get install nodejs")
    with resources.as_file(resources.files("rtc.pages").joinpath(module)) as path:
        done = subprocess.run(
            [node, "--input-type=module", "--no-warnings", "-e", script.replace("%s", path.as_uri())],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    return json.loads(done.stdout)


FRESHNESS_SCRIPT = """
import { Freshness } from "%s";
const freshness = new Freshness();
const found = [];
for (const [at, what, value] of STEPS) {
  if (what === "frame") freshness.frame(at);
  if (what === "told") freshness.told(at, value);
  if (what === "unhidden") freshness.unhidden(at);
  if (what === "age") found.push(Math.round(freshness.age(at)));
  if (what === "left") found.push(freshness.left);
}
console.log(JSON.stringify(found));
"""

PICTURES = {"live": True, "frozen": False}
STILL = {"live": True, "frozen": True}
GONE = {"live": False, "frozen": False}

FRESHNESS: dict[str, tuple[list[tuple[object, ...]], list[object]]] = {
    "before the first picture": ([(0, "age"), (9000, "age")], [0, 0]),
    "pictures": ([(0, "frame"), (400, "age"), (450, "frame"), (900, "age")], [0, 0]),
    "no picture": ([(0, "frame"), (501, "age"), (800, "age")], [501, 800]),
    "the last picture is repeated": (
        [(0, "frame"), (600, "age"), (700, "frame"), (710, "age"), (800, "told", STILL), (900, "age")],
        [600, 710, 900],
    ),
    "it is repeated before the warning": (
        [(0, "frame"), (300, "frame"), (600, "frame"), (700, "told", STILL), (710, "age"), (800, "age")],
        [510, 600],
    ),
    "pictures come again": (
        [(0, "frame"), (600, "age"), (650, "frame"), (700, "told", PICTURES), (710, "age")],
        [600, 0],
    ),
    "pictures come to the relay but not here": (
        [(0, "frame"), (600, "age"), (700, "told", PICTURES), (710, "age")],
        [600, 710],
    ),
    "an answer that was asked for before the warning": (
        [(0, "frame"), (600, "age"), (650, "frame"), (590, "told", PICTURES), (700, "age")],
        [600, 700],
    ),
    "the publisher leaves": (
        [(0, "frame"), (10, "left"), (100, "told", GONE), (110, "age"), (110, "left"), (200, "told", None)],
        [False, 510, True],
    ),
    "the publisher comes back": (
        [(0, "frame"), (100, "told", GONE), (150, "frame"), (200, "told", PICTURES), (210, "age")],
        [0],
    ),
    "the first picture is an old one": ([(0, "told", STILL), (100, "frame"), (110, "age")], [610]),
    "the page was hidden": ([(0, "frame"), (9000, "unhidden"), (9100, "age"), (9600, "age")], [0, 600]),
}


@pytest.mark.peer
def test_a_warning_ends_with_a_new_picture_and_not_with_an_old_one_again() -> None:
    for name, (steps, expected) in FRESHNESS.items():
        script = FRESHNESS_SCRIPT.replace("STEPS", json.dumps(steps))
        assert (name, run_script("frames.js", script)) == (name, expected)


DELAY_SCRIPT = """
import { Recent, Slope, total } from "%s";
const slope = new Slope(), recent = new Recent();
const found = [slope.mean(), recent.mean(0)];
// Thirty pictures a second: of 10 ms each for a minute, then of 50 ms.
let sum = 0, count = 0;
for (let second = 0; second < 70; second += 1) {
  count += 30;
  sum += 30 * (second < 60 ? 10 : 50);
  slope.add(1000 * second, count, sum);
  recent.add(1000 * second, second < 60 ? 10 : 50);
}
found.push(slope.mean(), recent.mean(69000));
slope.add(70000, undefined, undefined);
recent.add(70000, null);
found.push(slope.mean(), recent.mean(70000));
slope.add(71000, 3, 60);
slope.add(72000, 6, 120);
found.push(slope.mean(), recent.mean(99000));
found.push(total([1, NaN, 2]), total([NaN, undefined, null]));
console.log(JSON.stringify(found));
"""


@pytest.mark.peer
def test_the_delay_now_is_that_of_the_last_seconds() -> None:
    assert run_script("delay.js", DELAY_SCRIPT) == [None, None, 50, 50, 50, 50, 20, None, 3, None]


STAMP_SCRIPT = """
import { paint, StampReader } from "%s";
const cells = [];
paint({ set fillStyle(value) { this.colour = value; },
        fillRect(x, y, w, h) { cells.push([x, y, w, h, this.colour === "#ececec" ? 1 : 0]); } },
      1280, 720, 0x123456789abc, 0xfedcba98);
console.log(JSON.stringify(cells));
"""


@pytest.mark.peer
def test_the_browsers_stamp_is_pythons() -> None:
    bits = Stamp(time_us=0x123456789ABC, counter=0xFEDCBA98).bits().ravel().tolist()
    expected = [
        [16 + 16 * (index % 16), 16 + 16 * (index // 16), 16, 16, bit] for index, bit in enumerate(bits)
    ]
    assert run_script("stamp.js", STAMP_SCRIPT) == expected
