// The publish page: opens camera, screen or test picture and sends it by WHIP, again after every loss.

import * as devices from "./devices.js";
import { $, bitrate, milliseconds, nominated, report, setProblem, setState, setWord, start } from "./page.js";
import { Keeper } from "./session.js";

const FIGURES_MS = 1000;
const METER_MS = 66;
const FIRST_RETRY_MS = 500, LAST_RETRY_MS = 8000;
const REFUSALS = { 409: ["taken", true] };
const BROWSER_ERRORS = {
  NotAllowedError: "denied", NotFoundError: "noCamera", NotReadableError: "noCamera",
  OverconstrainedError: "noCamera", TypeError: "insecure",
};

let input = null; // what is being sent: { stream, stop }
let keeper = null; // of the session
let meter = null;
let wanted = false; // whether the user wants to be live
let before = { at: 0, bytes: 0, frames: 0, encodeSeconds: 0 };

const checked = (name) => document.querySelector(`input[name=${name}]:checked`).value;

async function begin() {
  setProblem("");
  if (!$("stream").checkValidity()) {
    $("stream").focus();
    return setProblem("badName");
  }
  wanted = true;
  show();
  setState("asking");
  try {
    const choice = { picture: checked("picture"), camera: $("camera").value, sound: $("sound").value, size: checked("size") };
    const opened = await devices.open(choice);
    if (!wanted) return opened.stop();
    input = opened;
  } catch (error) {
    const word = BROWSER_ERRORS[error.name];
    if (!word) throw error;
    end();
    setState("failed");
    return setProblem(word);
  }
  $("preview").srcObject = input.stream;
  input.stream.getVideoTracks()[0].addEventListener("ended", end);
  if (input.stream.getAudioTracks().length) meter = new devices.Meter(input.stream);
  show();
  await fillDevices();
  if (!wanted) return;
  keeper = new Keeper({
    url: `/whip/${$("stream").value}`, token: $("token").value, refusals: REFUSALS,
    prepare: addTracks, told: follow, firstRetryMs: FIRST_RETRY_MS, lastRetryMs: LAST_RETRY_MS,
  });
  await keeper.open();
}

function addTracks(connection) {
  const { bitrate: maxBitrate } = devices.SIZES[checked("size")];
  for (const track of input.stream.getTracks()) {
    const sendEncodings = track.kind === "video" ? [{ maxBitrate, maxFramerate: 30 }] : [{}];
    connection.addTransceiver(track, { direction: "sendonly", streams: [input.stream], sendEncodings });
  }
}

function follow(state, word, detail) {
  if (state === "failed") end();
  if (state === "live") before = { at: 0, bytes: 0, frames: 0, encodeSeconds: 0 };
  if (word || state === "live") setProblem(word, detail);
  setState(state);
}

function end() {
  wanted = false;
  keeper?.end();
  keeper = null;
  input?.stop();
  input = null;
  meter?.close();
  meter = null;
  $("preview").srcObject = null;
  setState("idle");
  showLevel(0);
  show();
}

function show() {
  setWord($("go"), wanted ? "stop" : "start");
  $("go").classList.toggle("stop", wanted);
  for (const field of $("form").querySelectorAll("input, select")) field.disabled = wanted;
  const voice = input?.stream.getAudioTracks()[0];
  $("mute").disabled = !voice;
  const muted = Boolean(voice) && !voice.enabled;
  $("mute").setAttribute("aria-pressed", String(muted));
  setWord($("mute"), muted ? "unmute" : "mute");
  $("camera-row").hidden = checked("picture") !== "camera";
}

async function showFigures() {
  const connection = keeper?.connection;
  if (!connection) {
    for (const id of ["round-trip", "encoding", "resolution", "frame-rate", "bitrate", "lost"]) $(id).textContent = "–";
    return;
  }
  const stats = await connection.getStats();
  const video = report(stats, (item) => item.type === "outbound-rtp" && item.kind === "video");
  const remote = report(stats, (item) => item.type === "remote-inbound-rtp" && item.kind === "video");
  const pair = nominated(stats);
  const seconds = remote?.roundTripTime ?? pair?.currentRoundTripTime;
  $("round-trip").textContent = milliseconds(1000 * seconds);
  $("lost").textContent = remote?.packetsLost ?? "–";
  if (!video) return;
  const now = { at: video.timestamp, bytes: video.bytesSent, frames: video.framesEncoded, encodeSeconds: video.totalEncodeTime };
  if (before.at && now.at > before.at) {
    const frames = now.frames - before.frames;
    $("bitrate").textContent = bitrate((8000 * (now.bytes - before.bytes)) / (now.at - before.at));
    $("encoding").textContent = milliseconds((1000 * (now.encodeSeconds - before.encodeSeconds)) / frames);
  }
  before = now;
  $("resolution").textContent = video.frameWidth ? `${video.frameWidth} × ${video.frameHeight}` : "–";
  $("frame-rate").textContent = video.framesPerSecond ? `${Math.round(video.framesPerSecond)} /s` : "–";
}

function showLevel(level) {
  const percent = Math.round(100 * level);
  $("meter-bar").style.setProperty("--level", `${percent}%`);
  $("meter").setAttribute("aria-valuenow", String(percent));
}

async function fillDevices() {
  const found = await devices.list();
  fill($("camera"), found.cameras);
  fill($("sound"), found.microphones);
}

function fill(select, items) {
  for (const option of select.querySelectorAll("option[data-device]")) {
    if (!items.some((item) => item.deviceId === option.value)) option.remove();
  }
  for (const item of items) {
    if ([...select.options].some((option) => option.value === item.deviceId)) continue;
    const option = new Option(item.label, item.deviceId);
    option.dataset.device = "";
    select.add(option, select.options.length - (select.id === "sound" ? 1 : 0));
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (wanted) end();
  else begin();
});
$("mute").addEventListener("click", () => {
  const voice = input?.stream.getAudioTracks()[0];
  if (voice) voice.enabled = !voice.enabled;
  show();
});
$("form").addEventListener("change", show);
navigator.mediaDevices?.addEventListener("devicechange", fillDevices);
addEventListener("pagehide", () => keeper?.end());
setInterval(showFigures, FIGURES_MS);
setInterval(() => meter && showLevel(meter.level()), METER_MS);
start(show);
setState("idle");
show();
fillDevices();
