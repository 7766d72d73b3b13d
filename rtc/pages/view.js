// The viewer page: lists what is live, plays one stream by WHEP, says how old the picture is, and warns at
// once when it has stopped. A still picture that looks live is the worst that a doctor can be shown.

import { $, bitrate, milliseconds, nominated, report, say, setProblem, setState, setWord, start } from "./page.js";
import { Refused, Session } from "./session.js";
import { StampReader, age } from "./stamp.js";

const FREEZE_MS = 500;
const FREEZE_CHECK_MS = 100;
const FIGURES_MS = 1000;
const LIST_MS = 2000;
const FIRST_RETRY_MS = 250, LAST_RETRY_MS = 5000;
const PLAUSIBLE_MS = 10_000; // a stamp that is older was painted by another clock

const player = $("player");
const reader = new StampReader();

let watching = ""; // name of the stream that the user wants to see
let session = null;
let listed = [];
let retryMs = FIRST_RETRY_MS;
let retryTimer = 0;
let lastFrame = 0; // when the last new picture was shown, 0 before the first
let stampDelay = NaN;
let before = { at: 0, bytes: 0, delay: 0, emitted: 0 };

// ------------------------------------------------------------------------------------------- streams

async function refresh() {
  const token = $("token").value;
  let answer;
  try {
    answer = await fetch("/streams", { headers: token ? { Authorization: `Bearer ${token}` } : {}, cache: "no-store" });
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    setProblem("unreachable");
    return;
  }
  if (answer.status === 401) {
    listed = [];
    setProblem("wrongToken");
  } else if (answer.ok) {
    listed = (await answer.json()).streams;
    if (!watching || session?.connection?.connectionState === "connected") setProblem("");
  }
  showList();
}

function showList() {
  $("no-streams").hidden = listed.length > 0;
  const items = listed.map((stream) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "stream";
    button.dataset.stream = stream.name;
    button.setAttribute("aria-current", String(stream.name === watching));
    const name = document.createElement("b");
    name.textContent = stream.name;
    const about = document.createElement("span");
    about.textContent = describe(stream);
    const dot = document.createElement("i");
    dot.className = stream.live ? "dot live" : "dot";
    button.append(dot, name, about);
    button.addEventListener("click", () => watch(stream.name));
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
  const focused = document.activeElement?.dataset?.stream;
  $("streams").replaceChildren(...items);
  if (focused) $("streams").querySelector(`[data-stream="${focused}"]`)?.focus();
}

function describe(stream) {
  if (!stream.live) return say("away");
  const size = stream.width ? `${stream.width} × ${stream.height}` : "";
  const rate = stream.fps ? `${Math.round(stream.fps)} /s` : "";
  return [size, rate, `${stream.viewers} ${say("viewers")}`].filter(Boolean).join(" · ");
}

// ------------------------------------------------------------------------------------------ watching

async function watch(name) {
  leave();
  watching = name;
  showList();
  await connect("connecting");
}

async function connect(state) {
  setState(state);
  const mine = new Session(`/whep/${watching}`, $("token").value);
  session = mine;
  try {
    await mine.open((connection) => receive(connection), (settled) => session === mine && follow(settled));
    if (session !== mine) mine.close();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (session !== mine) return;
    setProblem(error.word, error.message);
    if (error.retry) return again();
    leave();
    setState("failed");
  }
}

function receive(connection) {
  const stream = new MediaStream();
  for (const kind of ["video", "audio"]) {
    stream.addTrack(connection.addTransceiver(kind, { direction: "recvonly" }).receiver.track);
  }
  player.srcObject = stream;
}

function follow(state) {
  if (state === "connected") {
    retryMs = FIRST_RETRY_MS;
    before = { at: 0, bytes: 0, delay: 0, emitted: 0 };
    setProblem("");
    setState("live");
    show();
  } else if (state === "failed" || state === "disconnected" || state === "closed") {
    setProblem("lostConnection");
    again();
  }
}

function again() {
  session?.close();
  session = null;
  if (!watching) return;
  setState("reconnecting");
  clearTimeout(retryTimer);
  retryTimer = setTimeout(() => watching && connect("reconnecting"), retryMs);
  retryMs = Math.min(2 * retryMs, LAST_RETRY_MS);
}

function leave() {
  watching = "";
  clearTimeout(retryTimer);
  session?.close();
  session = null;
  player.srcObject = null;
  lastFrame = 0;
  stampDelay = NaN;
  delete player.dataset.counter;
  retryMs = FIRST_RETRY_MS;
  setState("idle");
  show();
  showList();
}

// ------------------------------------------------------------------------------------------- figures

function onFrame(_, metadata) {
  lastFrame = performance.now();
  player.dataset.frames = metadata.presentedFrames;
  const stamp = reader.read(player, metadata.width, metadata.height);
  if (stamp) {
    player.dataset.counter = stamp.counter;
    const delay = age(stamp) / 1000;
    stampDelay = delay > -5 && delay < PLAUSIBLE_MS ? Math.max(delay, 0) : NaN;
    player.dataset.delay = stampDelay;
  } else {
    stampDelay = NaN;
  }
  player.requestVideoFrameCallback(onFrame);
}

function checkFreeze() {
  const age = lastFrame ? performance.now() - lastFrame : 0;
  // A hidden page is not given pictures by the browser; that is no freeze.
  const frozen = Boolean(watching) && age > FREEZE_MS && document.visibilityState === "visible";
  $("frozen").hidden = !frozen;
  $("screen").classList.toggle("old", frozen);
  if (frozen) $("frozen-seconds").textContent = (age / 1000).toFixed(1);
}

async function showFigures() {
  const ids = ["latency", "resolution", "frame-rate", "bitrate", "lost", "relay", "network", "buffer", "measured"];
  if (session?.connection?.connectionState !== "connected") {
    for (const id of ids) $(id).textContent = "–";
    return;
  }
  const stats = await session.connection.getStats();
  const video = report(stats, (item) => item.type === "inbound-rtp" && item.kind === "video");
  const network = (nominated(stats)?.currentRoundTripTime ?? NaN) * 500;
  const relay = listed.find((stream) => stream.name === watching)?.latency?.total?.p50_ms ?? NaN;
  let buffer = NaN;
  if (video) {
    const now = {
      at: video.timestamp, bytes: video.bytesReceived, emitted: video.framesDecoded,
      delay: video.totalProcessingDelay ?? video.jitterBufferDelay,
    };
    if (before.at && now.at > before.at) {
      $("bitrate").textContent = bitrate((8000 * (now.bytes - before.bytes)) / (now.at - before.at));
      buffer = (1000 * (now.delay - before.delay)) / (now.emitted - before.emitted);
    }
    before = now;
    $("resolution").textContent = video.frameWidth ? `${video.frameWidth} × ${video.frameHeight}` : "–";
    $("frame-rate").textContent = video.framesPerSecond ? `${Math.round(video.framesPerSecond)} /s` : "–";
    $("lost").textContent = video.packetsLost;
  }
  $("relay").textContent = milliseconds(relay);
  $("network").textContent = milliseconds(network);
  $("buffer").textContent = milliseconds(buffer);
  $("measured").textContent = milliseconds(stampDelay);
  $("latency").textContent = milliseconds(Number.isFinite(stampDelay) ? stampDelay : relay + network + buffer);
}

function show() {
  const active = Boolean(watching);
  $("empty").hidden = active;
  for (const id of ["sound", "fullscreen", "leave"]) $(id).disabled = !active;
  setWord($("sound"), player.muted ? "soundOn" : "soundOff");
  $("sound").setAttribute("aria-pressed", String(!player.muted));
}

$("sound").addEventListener("click", () => {
  player.muted = !player.muted;
  player.play();
  show();
});
$("fullscreen").addEventListener("click", () => {
  if (document.fullscreenElement) document.exitFullscreen();
  else $("screen").requestFullscreen();
});
$("leave").addEventListener("click", leave);
$("token").addEventListener("change", refresh);
addEventListener("pagehide", () => session?.close());
player.requestVideoFrameCallback(onFrame);
setInterval(checkFreeze, FREEZE_CHECK_MS);
setInterval(showFigures, FIGURES_MS);
setInterval(refresh, LIST_MS);
start(() => {
  show();
  showList();
});
setState("idle");
show();
refresh().then(() => {
  // ?stream=NAME watches at once, for a link that a nurse can send.
  const name = new URLSearchParams(location.search).get("stream");
  if (name) watch(name);
});
