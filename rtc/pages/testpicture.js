// A picture made here: colours, a moving hand, the time, and a stamp that the viewer page measures by.
// Each second a flash and a beep begin together, so that eyes and ears can judge lip sync.

import { paint, wallMicroseconds } from "./stamp.js";

const RATE = 30;
const FLASH_MS = 100;
const COLOURS = ["#d9d9d9", "#d6c419", "#20b8b8", "#1fae3a", "#b53bb0", "#c23a2e", "#2a4bbd"];

export class TestPicture {
  #timer;
  #sound = null;
  #beeped = -1;

  constructor(width, height, withSound) {
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = height;
    this.context = canvas.getContext("2d", { alpha: false });
    this.counter = 0;
    this.stream = canvas.captureStream(0);
    this.track = this.stream.getVideoTracks()[0];
    if (withSound) {
      this.#sound = new AudioContext({ sampleRate: 48000 });
      this.output = this.#sound.createMediaStreamDestination();
      this.stream.addTrack(this.output.stream.getAudioTracks()[0]);
    }
    this.#draw();
    this.#timer = setInterval(() => this.#draw(), 1000 / RATE);
  }

  #draw() {
    const { context } = this;
    const { width, height } = context.canvas;
    const now = wallMicroseconds();
    const inSecond = (now / 1000) % 1000;
    COLOURS.forEach((colour, index) => {
      context.fillStyle = colour;
      context.fillRect((index * width) / 7, 0, width / 7 + 1, height * 0.7);
    });
    context.fillStyle = "#16202a";
    context.fillRect(0, height * 0.7, width, height * 0.3);
    context.fillStyle = inSecond < FLASH_MS ? "#ffffff" : "#33414d";
    context.fillRect(width * 0.04, height * 0.75, height * 0.2, height * 0.2);
    this.#hand(width / 2, height * 0.35, height * 0.28, (inSecond / 1000) * 2 * Math.PI);
    context.fillStyle = "#ffffff";
    context.font = `600 ${Math.round(height / 10)}px ui-monospace, monospace`;
    context.textBaseline = "middle";
    context.fillText(new Date(now / 1000).toISOString().slice(11, 23), width * 0.2, height * 0.85);
    paint(context, width, height, now, this.counter);
    this.counter += 1;
    this.track.requestFrame();
    this.#beep(Math.floor(now / 1e6), inSecond);
  }

  #hand(x, y, length, angle) {
    const { context } = this;
    context.fillStyle = "#101820";
    context.beginPath();
    context.arc(x, y, length, 0, 2 * Math.PI);
    context.fill();
    context.strokeStyle = "#ffffff";
    context.lineWidth = length / 14;
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(x + length * Math.sin(angle), y - length * Math.cos(angle));
    context.stroke();
  }

  #beep(second, inSecond) {
    if (!this.#sound || second === this.#beeped || inSecond > FLASH_MS) return;
    this.#beeped = second;
    const tone = new OscillatorNode(this.#sound, { frequency: 1000 });
    const gain = new GainNode(this.#sound, { gain: 0.2 });
    tone.connect(gain).connect(this.output);
    tone.start();
    tone.stop(this.#sound.currentTime + FLASH_MS / 1000);
  }

  stop() {
    clearInterval(this.#timer);
    this.#sound?.close();
  }
}
