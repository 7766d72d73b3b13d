// The viewer page: lists what is live, plays one stream by WHEP, says how old the picture is, and warns at
// once when it has stopped. A still picture that looks live is the worst that a doctor can be shown.

import { Recent, Slope, total } from "./delay.js";
import { Freshness, eachFrame } from "./frames.js";
import { $, bitrate, milliseconds, nominated, report, say, setProblem, setState, setWord, start } from "./page.js";
import { Keeper } from "./session.js";
import { StampReader, age } from "./stamp.js";

const FREEZE_CHECK_MS = 100;
const FIGURES_MS = 1000;
const LIST_MS = 2000, WATCHED_LIST_MS = 1000, HELD_LIST_MS = 250;
const FIRST_RETRY_MS = 250, LAST_RETRY_MS = 5000;
const PLAUSIBLE_MS = 10_000; // a stamp that is older was painted by another clock
const HOPS = ["receive", "handover", "link", "encode", "send", "total"];

const player = $("player");
const reader = new StampReader();
const freshness = new Freshness();
const hops = Object.fromEntries(HOPS.map((hop) => [hop, new Slope()]));
const playout = new Slope();
const stamps = new Recent();
const network = new Recent();

let watching = ""; // name of the stream that the user wants to see
let keeper = null; // of its session
let connected = "idle"; // what the keeper says
let listed = [];
let listTimer = 0;
let before = { at: 0, bytes: 0 };

// ------------------------------------------------------------------------------------------- streams

async function refresh() {
  clearTimeout(listTimer);
  const asked = performance.now();
  await list(asked);
  const ms = !watching ? LIST_MS : freshness.heldSince === null ? WATCHED_LIST_MS : HELD_LIST_MS;
  clearTimeout(listTimer);
  listTimer = setTimeout(refresh, ms);
}

async function list(asked) {
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
    if (!watching || keeper?.connection) setProblem("");
    if (watching) follow(asked, listed.find((stream) => stream.name === watching));
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
  keeper = new Keeper({
    url: `/whep/${name}`, token: $("token").value,
    prepare: receive, told, firstRetryMs: FIRST_RETRY_MS, lastRetryMs: LAST_RETRY_MS,
  });
  await keeper.open();
}

function receive(connection) {
  const stream = new MediaStream();
  for (const kind of ["video", "audio"]) {
    stream.addTrack(connection.addTransceiver(kind, { direction: "recvonly" }).receiver.track);
  }
  player.srcObject = stream;
}

function told(state, word, detail) {
  if (state === "failed") leave();
  if (word || state === "live") setProblem(word, detail);
  connected = state;
  if (state === "live") before = { at: 0, bytes: 0 };
  show();
  refresh();
}

function leave() {
  watching = "";
  keeper?.end();
  keeper = null;
  connected = "idle";
  player.srcObject = null;
  freshness.reset();
  for (const figure of [...Object.values(hops), playout, stamps, network]) figure.clear();
  delete player.dataset.counter;
  show();
  showList();
}

/** What the relay says of the stream that is watched. */
function follow(asked, stream) {
  freshness.told(asked, stream ?? null);
  for (const hop of HOPS) hops[hop].add(asked, stream?.latency?.[hop]?.count, stream?.latency?.[hop]?.sum_ms);
}

// ------------------------------------------------------------------------------------------- figures

function onFrame(count, width, height) {
  const now = performance.now();
  freshness.frame(now);
  player.dataset.frames = count;
  const stamp = reader.read(player, width, height);
  if (!stamp) return;
  player.dataset.counter = stamp.counter;
  const delay = age(stamp) / 1000;
  if (delay <= -5 || delay >= PLAUSIBLE_MS) return;
  stamps.add(now, Math.max(delay, 0));
  player.dataset.delay = Math.max(delay, 0);
}

function checkFreeze() {
  const wasHeld = freshness.heldSince !== null;
  // A hidden page is not given pictures by the browser; that is no freeze.
  const age = watching && document.visibilityState === "visible" ? freshness.age(performance.now()) : 0;
  const held = freshness.heldSince !== null;
  $("frozen").hidden = !age;
  $("screen").classList.toggle("old", age > 0);
  if (age) $("frozen-seconds").textContent = (age / 1000).toFixed(1);
  const state = connected !== "live" ? connected : freshness.left ? "left" : held ? "still" : "live";
  if ($("state").dataset.state !== state) setState(state);
  if (held && !wasHeld) refresh();
}

async function showFigures() {
  const connection = keeper?.connection;
  if (!connection) {
    for (const field of document.querySelectorAll("dl dd")) field.textContent = "–";
    return;
  }
  const stats = await connection.getStats();
  const now = performance.now();
  const video = report(stats, (item) => item.type === "inbound-rtp" && item.kind === "video");
  network.add(now, nominated(stats)?.currentRoundTripTime * 500);
  if (video) {
    playout.add(now, video.framesDecoded, 1000 * (video.totalProcessingDelay ?? video.jitterBufferDelay));
    if (before.at && video.timestamp > before.at) {
      $("bitrate").textContent = bitrate((8000 * (video.bytesReceived - before.bytes)) / (video.timestamp - before.at));
    }
    before = { at: video.timestamp, bytes: video.bytesReceived };
    $("resolution").textContent = video.frameWidth ? `${video.frameWidth} × ${video.frameHeight}` : "–";
    $("frame-rate").textContent = video.framesPerSecond ? `${Math.round(video.framesPerSecond)} /s` : "–";
    $("lost").textContent = video.packetsLost ?? "–";
  }
  showDelay(now);
}

function showDelay(now) {
  for (const hop of HOPS) $(hop).textContent = milliseconds(hops[hop].mean());
  const parts = [hops.total.mean(), network.mean(now), playout.mean()];
  const measured = stamps.mean(now);
  $("network").textContent = milliseconds(parts[1]);
  $("playout").textContent = milliseconds(parts[2]);
  $("measured").textContent = milliseconds(measured);
  $("latency").textContent = milliseconds(Number.isFinite(measured) ? measured : total(parts));
}

function showFullscreen() {
  const screen = $("screen");
  if (document.fullscreenElement) document.exitFullscreen();
  else if (screen.requestFullscreen) screen.requestFullscreen();
  else player.webkitEnterFullscreen?.(); // an iPhone shows the video alone
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
$("fullscreen").addEventListener("click", showFullscreen);
$("leave").addEventListener("click", leave);
$("token").addEventListener("change", refresh);
addEventListener("pagehide", () => keeper?.end());
addEventListener("visibilitychange", () => freshness.unhidden(performance.now()));
eachFrame(player, onFrame);
setInterval(checkFreeze, FREEZE_CHECK_MS);
setInterval(showFigures, FIGURES_MS);
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
