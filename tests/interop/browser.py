"""A headless Chromium, driven over its DevTools protocol: pages opened, expressions evaluated.

    async with chromium(tmp_path) as browser:
        page = await browser.open("http://127.0.0.1:8081/")
        await page.until("document.querySelector('#state').dataset.state === 'live'")

Only the few methods that tests need. Errors and exceptions of the page are kept in `Page.problems`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from tests.peers import require

START_SECONDS = 30.0
ANSWER_SECONDS = 20.0
POLL_SECONDS = 0.05

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--mute-audio",
    "--autoplay-policy=no-user-gesture-required",
    # Two pages of one browser publish and view: neither may be slowed because the other is in front.
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--allow-loopback-in-peer-connection",
    "--disable-features=WebRtcHideLocalIpsWithMdns,Translate,MediaRouter",
    "--remote-debugging-port=0",
)


class BrowserError(AssertionError):
    """The browser, or what runs in it, did not do what was asked."""


class Browser:
    """A running browser, by its DevTools socket."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}

    async def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call one method of the protocol; its result."""
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json({**message, "sessionId": session} if session else message)
        async with asyncio.timeout(ANSWER_SECONDS):
            return await answer

    async def listen(self) -> None:
        """Sort answers and events until the socket closes."""
        async for message in self._socket:
            data = message.json()
            answer = self._waiting.pop(data.get("id"), None)
            if answer is not None and not answer.done():
                if "error" in data:
                    answer.set_exception(BrowserError(data["error"]["message"]))
                else:
                    answer.set_result(data["result"])
            elif data.get("sessionId") in self._pages:
                self._pages[data["sessionId"]].event(data["method"], data["params"])

    async def open(
        self,
        url: str,
        *,
        width: int = 1280,
        height: int = 800,
        phone: bool = False,
        language: str = "en",
        before: str = "",
    ) -> Page:
        """Open a page in a window of its own; `before` is run in it before its own scripts."""
        target = await self.call("Target.createTarget", url="about:blank", newWindow=True)
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(self, attached["sessionId"])
        self._pages[attached["sessionId"]] = page
        for domain in ("Page", "Runtime", "Log"):
            await page.call(f"{domain}.enable")
        await page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        locale = {"en": "en-US", "zh": "zh-CN"}[language]
        agent = (await self.call("Browser.getVersion"))["userAgent"]
        await page.call("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=locale)
        if before:
            await page.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        await page.call("Page.navigate", url=url)
        await page.until(
            f"location.href !== 'about:blank' && document.readyState === 'complete' && {url!r} && true"
        )
        return page


class Page:
    """One page. `problems` are its console errors and uncaught exceptions."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self.problems: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return await self._browser.call(method, self._session, **parameters)

    def event(self, method: str, parameters: dict[str, Any]) -> None:
        """Keep what went wrong in the page."""
        if method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.problems.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")

    async def evaluate(self, expression: str) -> Any:
        """The value of an expression; promises are awaited.

        Raises:
            BrowserError: It threw.
        """
        answer = await self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    async def until(self, expression: str, seconds: float = ANSWER_SECONDS) -> Any:
        """Evaluate again and again until it is true; its value.

        Raises:
            BrowserError: It never was.
        """
        try:
            async with asyncio.timeout(seconds):
                while not (value := await self.evaluate(expression)):
                    await asyncio.sleep(POLL_SECONDS)
                return value
        except TimeoutError:
            raise BrowserError(f"not within {seconds} s: {expression}; problems: {self.problems}") from None

    async def fill(self, **values: str) -> None:
        """Write into fields, by their ids, as a user would."""
        for name, value in values.items():
            await self.evaluate(
                f"(() => {{ const field = document.getElementById({name!r}); field.value = {value!r};"
                " field.dispatchEvent(new Event('change', {bubbles: true})); })()"
            )

    async def click(self, selector: str) -> None:
        await self.evaluate(f"document.querySelector({selector!r}).click()")

    async def text(self, selector: str) -> str:
        return str(await self.evaluate(f"document.querySelector({selector!r}).textContent"))

    async def screenshot(self, path: Path) -> None:
        """Write a PNG of what the window shows."""
        picture = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(picture["data"]))

    async def close(self) -> None:
        await self.call("Page.close")


@contextlib.asynccontextmanager
async def chromium(directory: Path, flags: Sequence[str] = ()) -> AsyncIterator[Browser]:
    """Start a browser with an empty profile in `directory`; end it, and all it started, with the block."""
    profile = directory / "chromium"
    log = directory / "chromium.log"
    profile.mkdir(parents=True)
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            require("chromium"),
            *FLAGS,
            *flags,
            f"--user-data-dir={profile}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        address = await _address(profile / "DevToolsActivePort", process, log)
        async with aiohttp.ClientSession() as http, http.ws_connect(address, max_msg_size=0) as socket:
            browser = Browser(socket)
            listening = asyncio.create_task(browser.listen())
            yield browser
            await socket.close()
            await listening
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _address(file: Path, process: asyncio.subprocess.Process, log: Path) -> str:
    try:
        async with asyncio.timeout(START_SECONDS):
            while not (file.exists() and len(lines := file.read_text().split()) == 2):
                if process.returncode is not None:
                    raise BrowserError(f"chromium ended with {process.returncode}: {log.read_text()[-2000:]}")
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise BrowserError(f"chromium gave no address: {log.read_text()[-2000:]}") from None
    return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
