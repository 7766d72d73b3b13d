"""Chromium on both sides: published by one page, watched by the other, the stamps read in the page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rtc.camera import Camera, Size
from tests.interop.browser import Browser, Page, chromium
from tests.peers import free_port, require
from tests.product import REPOSITORY, Product, running

pytestmark = pytest.mark.peer

EXAMPLE = REPOSITORY / "docs/examples/consultation.toml"

LIVE = "document.querySelector('#state').dataset.state === 'live'"
COUNTER = "Number(document.querySelector('#player').dataset.counter ?? -1)"
LEVEL = "Number(document.querySelector('#meter').getAttribute('aria-valuenow'))"

HEARD = """
(async () => {
  const player = document.querySelector('#player');
  const context = new AudioContext();
  const analyser = new AnalyserNode(context);
  context.createMediaStreamSource(player.srcObject).connect(analyser);
  const samples = new Float32Array(analyser.fftSize);
  const end = performance.now() + 4000;
  while (performance.now() < end) {
    analyser.getFloatTimeDomainData(samples);
    if (samples.some((sample) => Math.abs(sample) > 0.01)) return true;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return false;
})()
"""
"""Whether the stream's sound is more than silence, within four beeps of the test picture."""

CLIP = Size(width=640, height=360, rate=30)
CLIP_PICTURES = 60


@pytest.fixture(scope="module")
def consultation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """The example that ships, on free ports."""
    text = EXAMPLE.read_text()
    for port in (8081, 8082, 8083, 8084):
        text = text.replace(f'"127.0.0.1:{port}"', f'"127.0.0.1:{free_port()}"')
    require("chromium")
    with running(text, tmp_path_factory.mktemp("relay")) as relay:
        yield relay


def page_of(relay: Product, lane: str, side: str) -> str:
    table = relay.lane(lane)[side]
    return f"http://{table['whip' if side == 'source' else 'whep']['listen']}/"


async def publish(browser: Browser, url: str, stream: str, picture: str = "test") -> Page:
    """Open the publish page, choose a picture, start, wait until it is live."""
    page = await browser.open(url)
    await page.fill(stream=stream)
    await page.click(f"input[value={picture}]")
    await page.click("#go")
    await page.until(LIVE)
    return page


async def watch(browser: Browser, url: str, stream: str, before: str = "") -> Page:
    """Open the viewer page, choose the stream from its list, wait until a picture is there."""
    page = await browser.open(url, before=before)
    await page.until(f"document.querySelector('[data-stream={stream}]') !== null")
    await page.click(f"[data-stream={stream}]")
    await page.until(LIVE)
    await page.until("document.querySelector('#player').videoWidth > 0")
    return page


async def advancing(page: Page) -> None:
    """The stamp in the page's picture goes forward."""
    first = await page.until(f"{COUNTER} >= 0 && {COUNTER} + 1")
    await page.until(f"{COUNTER} >= {first} + 15")


async def test_a_consultation_is_seen_and_heard_both_ways(consultation: Product, tmp_path: Path) -> None:
    async with chromium(tmp_path) as browser:
        patient = await publish(browser, page_of(consultation, "patient", "source"), "patient")
        doctor = await publish(browser, page_of(consultation, "doctor", "source"), "doctor")
        seen_by_doctor = await watch(browser, page_of(consultation, "patient", "sink"), "patient")
        seen_by_patient = await watch(browser, page_of(consultation, "doctor", "sink"), "doctor")
        for page in (seen_by_doctor, seen_by_patient):
            await advancing(page)
            # Painted and shown by one clock: the whole way, both networks, the browser's own parts included.
            delay = await page.evaluate("Number(document.querySelector('#player').dataset.delay)")
            assert 0 < delay < 2000, f"{delay} ms from painted to shown"
            assert await page.evaluate(HEARD), "no sound came"
            await page.until("document.querySelector('#frozen').hidden")
        names = [
            await page.evaluate("[...document.querySelectorAll('[data-stream]')].map(x => x.dataset.stream)")
            for page in (seen_by_doctor, seen_by_patient)
        ]
        assert ["patient" in shown for shown in names] == [True, False], names
        assert ["doctor" in shown for shown in names] == [False, True], names
        await patient.click("#go")
        await seen_by_doctor.until("!document.querySelector('#frozen').hidden")
        assert await seen_by_doctor.text("#frozen strong")
        await seen_by_doctor.until("document.querySelector('#state').dataset.state === 'left'")
        assert await seen_by_doctor.text("#state") == "Publisher has left"
        for page in (patient, doctor, seen_by_patient):
            assert not page.problems


def streams(relay: Product) -> dict[str, object]:
    """What the first lane's source publishes now."""
    found: dict[str, object] = relay.status()["lanes"][0]["source"]["figures"]["streams"]
    return found


async def test_stop_while_connecting_leaves_nothing_behind(consultation: Product, tmp_path: Path) -> None:
    slow = """
        const quick = window.fetch;
        window.fetch = async (url, options) => {
          const answer = await quick(url, options);
          if (options?.method === "POST") await new Promise((resolve) => { window.release = resolve; });
          return answer;
        };
    """
    async with chromium(tmp_path) as browser:
        page = await browser.open(page_of(consultation, "patient", "source"), before=slow)
        await page.fill(stream="hasty")
        await page.click("input[value=test]")
        await page.click("#go")
        # The relay has answered, and the page has not heard it yet.
        await page.until("window.release && true")
        await page.click("#go")
        await page.evaluate("window.release(), window.release = null, true")
        await page.click("#go")
        await page.until("window.release && true")
        await page.evaluate("window.release()")
        await page.until(LIVE, seconds=4)
        assert not page.problems
        await page.click("#go")
        async with asyncio.timeout(10):
            while "hasty" in streams(consultation):
                await asyncio.sleep(0.1)


SHOWN = "Number(document.querySelector('#player').dataset.frames)"
WARNED = "!document.querySelector('#frozen').hidden"


async def test_a_picture_that_is_shown_again_does_not_end_the_warning(
    consultation: Product, tmp_path: Path
) -> None:
    async with chromium(tmp_path) as browser:
        sink = page_of(consultation, "patient", "sink")
        publisher = await publish(browser, page_of(consultation, "patient", "source"), "still")
        viewer = await watch(browser, sink, "still")
        await advancing(viewer)
        # The sound goes on, so the stream is live; its picture is the last one for ever.
        await publisher.evaluate("document.querySelector('#preview').srcObject.getVideoTracks()[0].stop()")
        await viewer.until(WARNED)
        await viewer.until("document.querySelector('#state').dataset.state === 'still'")
        before = await viewer.evaluate(SHOWN)
        await viewer.evaluate(
            "window.ended = false;"
            "setInterval(() => { window.ended ||= document.querySelector('#frozen').hidden; }, 10); 0"
        )
        # Another viewer is given a keyframe, made of the old picture; the first one is shown it as well.
        other = await browser.open(sink + "?stream=still")
        await other.until("document.querySelector('#player').videoWidth > 0")
        await other.until(WARNED)
        await viewer.until(f"{SHOWN} > {before}")
        await viewer.until("Number(document.querySelector('#frozen-seconds').textContent) > 3")
        assert not await viewer.evaluate("window.ended"), "the warning ended"


BARE = """
    delete HTMLVideoElement.prototype.requestVideoFrameCallback;
    delete Element.prototype.requestFullscreen;
    HTMLVideoElement.prototype.webkitEnterFullscreen = function () { window.full = this.id; };
"""
"""What the browsers of some phones lack, and what iPhones have instead."""

FIGURE = "Number.parseFloat(document.querySelector('#{}').textContent) >= 0"


async def test_the_viewer_page_needs_no_more_than_phones_have(consultation: Product, tmp_path: Path) -> None:
    async with chromium(tmp_path) as browser:
        await publish(browser, page_of(consultation, "patient", "source"), "phone")
        viewer = await watch(browser, page_of(consultation, "patient", "sink"), "phone", BARE)
        await advancing(viewer)
        await viewer.click("#fullscreen")
        assert await viewer.evaluate("window.full") == "player"
        for name in ("latency", "receive", "handover", "link", "encode", "send", "total", "measured"):
            await viewer.until(FIGURE.format(name))
        assert not await viewer.evaluate(WARNED)
        assert not viewer.problems


def write_camera(path: Path) -> Path:
    """A y4m film of stamped pictures, which Chromium plays as its camera, over and over."""
    camera = Camera(CLIP)
    with path.open("wb") as file:
        file.write(f"YUV4MPEG2 W{CLIP.width} H{CLIP.height} F{CLIP.rate}:1 Ip A1:1 C420jpeg\n".encode())
        for counter in range(CLIP_PICTURES):
            file.write(b"FRAME\n")
            file.writelines(camera.picture(counter).planes)
    return path


async def test_a_camera_and_a_microphone_cross(consultation: Product, tmp_path: Path) -> None:
    film = write_camera(tmp_path / "camera.y4m")
    async with chromium(tmp_path, [f"--use-file-for-fake-video-capture={film}"]) as browser:
        publisher = await publish(browser, page_of(consultation, "patient", "source"), "film", "camera")
        viewer = await watch(browser, page_of(consultation, "patient", "sink"), "film")
        seen: set[int] = set()
        async with asyncio.timeout(20):
            while len(seen) < 10:
                counter = await viewer.evaluate(COUNTER)
                if counter >= 0:
                    seen.add(counter)
        assert max(seen) < CLIP_PICTURES
        await publisher.until(f"{LEVEL} > 0")
        await publisher.click("#mute")
        await publisher.until(f"{LEVEL} === 0")
        assert (await publisher.text("#mute")) == "Unmute microphone"
        assert not publisher.problems + viewer.problems


async def test_the_pages_speak_chinese_and_survive_a_phone(consultation: Product, tmp_path: Path) -> None:
    async with chromium(tmp_path) as browser:
        for url in (page_of(consultation, "patient", "source"), page_of(consultation, "patient", "sink")):
            page = await browser.open(url, width=360, height=740, phone=True, language="zh")
            assert await page.evaluate("document.documentElement.lang") == "zh-CN"
            assert (await page.text("h1")) in ("发布", "观看")
            assert await page.evaluate("document.documentElement.scrollWidth <= 360"), "it scrolls sideways"
            small = await page.evaluate(
                "[...document.querySelectorAll('main button, main select, main input:not([type=radio])')]"
                ".filter(x => x.offsetParent && x.offsetHeight < 44).map(x => x.id)"
            )
            assert not small, f"too small for a thumb: {small}"
            await page.click("#language")
            assert (await page.text("h1")) in ("Publish", "View")
            nameless = await page.evaluate(
                "[...document.querySelectorAll('button, input, select')]"
                ".filter(x => x.offsetParent && !(x.innerText || x.ariaLabel || x.labels?.length))"
                ".map(x => x.id)"
            )
            assert not nameless, f"without a name for screen readers: {nameless}"
            assert not page.problems


@pytest.mark.slow
async def test_a_name_that_is_taken_and_a_stream_that_is_not_there(
    consultation: Product, tmp_path: Path
) -> None:
    async with chromium(tmp_path) as browser:
        url = page_of(consultation, "patient", "source")
        await publish(browser, url, "room-1")
        second = await browser.open(url)
        await second.fill(stream="room-1")
        await second.click("input[value=test]")
        await second.click("#go")
        await second.until("!document.querySelector('#problem').hidden")
        assert (await second.text("#problem-word")).startswith("This name is being published already")
        viewer = await browser.open(page_of(consultation, "patient", "sink") + "?stream=nobody")
        await viewer.until(
            "document.querySelector('#problem-word').textContent.startsWith('There is no such')"
        )


def test_the_example_is_one_that_check_accepts(consultation: Product) -> None:
    assert json.loads(consultation.command("check", str(EXAMPLE), "--json"))
