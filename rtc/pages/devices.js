// Where pictures and sound come from: camera, screen, test picture; and how loud the sound is.

import { TestPicture } from "./testpicture.js";

export const SIZES = { 720: { width: 1280, height: 720, bitrate: 4e6 }, 1080: { width: 1920, height: 1080, bitrate: 8e6 } };

const SOUND = { echoCancellation: true, noiseSuppression: true, autoGainControl: true };

function microphone(id) {
  if (id === "none") return false;
  return id ? { ...SOUND, deviceId: { exact: id } } : SOUND;
}

/** Open what the form says; `{ stream, stop }`. Throws the browser's own errors. */
export async function open({ picture, camera, sound, size }) {
  const { width, height } = SIZES[size];
  if (picture === "test") {
    const test = new TestPicture(width, height, sound !== "none");
    return opened(test.stream, () => test.stop());
  }
  const video = { width: { ideal: width }, height: { ideal: height }, frameRate: { ideal: 30, max: 30 } };
  const audio = microphone(sound);
  if (picture === "camera") {
    if (camera) video.deviceId = { exact: camera };
    return opened(await navigator.mediaDevices.getUserMedia({ video, audio }));
  }
  const screen = await navigator.mediaDevices.getDisplayMedia({ video });
  screen.getVideoTracks()[0].contentHint = "detail";
  if (audio) {
    try {
      const voice = await navigator.mediaDevices.getUserMedia({ audio });
      screen.addTrack(voice.getAudioTracks()[0]);
    } catch (error) {
      screen.getTracks().forEach((track) => track.stop());
      throw error;
    }
  }
  return opened(screen);
}

function opened(stream, also = () => {}) {
  const stop = () => {
    stream.getTracks().forEach((track) => track.stop());
    also();
  };
  return { stream, stop };
}

/** Cameras and microphones by kind; names are known once the user has allowed one. */
export async function list() {
  const found = (await navigator.mediaDevices?.enumerateDevices()) ?? [];
  const named = (kind) => found.filter((device) => device.kind === kind && device.deviceId && device.label);
  return { cameras: named("videoinput"), microphones: named("audioinput") };
}

/** Measures loudness: `level()` is 0 (silence) to 1 (full scale), on a scale of decibels. */
export class Meter {
  constructor(stream) {
    this.context = new AudioContext();
    this.analyser = new AnalyserNode(this.context, { fftSize: 1024 });
    this.samples = new Float32Array(1024);
    this.context.createMediaStreamSource(stream).connect(this.analyser);
  }

  level() {
    this.analyser.getFloatTimeDomainData(this.samples);
    const power = this.samples.reduce((sum, sample) => sum + sample * sample, 0) / this.samples.length;
    const decibels = 10 * Math.log10(power + 1e-9);
    return Math.min(1, Math.max(0, 1 + decibels / 60));
  }

  close() {
    this.context.close();
  }
}
