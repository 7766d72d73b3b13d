// What both pages share: language, small DOM helpers, figures.

import { WORDS } from "./words.js";

export const $ = (id) => document.getElementById(id);

let language = "en";

export const say = (key) => WORDS[language][key] ?? key;

function storedLanguage() {
  const stored = localStorage.getItem("language");
  if (stored in WORDS) return stored;
  return (navigator.languages ?? [navigator.language]).some((tag) => tag.toLowerCase().startsWith("zh"))
    && navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-word]")) {
    element.textContent = say(element.dataset.word);
  }
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", say(element.dataset.label));
    element.title = say(element.dataset.label);
  }
  document.title = `${say(document.body.dataset.title)} · medferry`;
}

/** Set up the language switch; `redraw` is called after each change. */
export function start(redraw = () => {}) {
  language = storedLanguage();
  translate();
  $("language").addEventListener("click", () => {
    language = language === "zh" ? "en" : "zh";
    localStorage.setItem("language", language);
    translate();
    redraw();
  });
}

/** Give an element a word that follows the language from now on; an empty key empties it. */
export function setWord(element, key) {
  if (key) element.dataset.word = key;
  else delete element.dataset.word;
  element.textContent = key ? say(key) : "";
}

export function setLabel(element, key) {
  element.dataset.label = key;
  element.setAttribute("aria-label", say(key));
  element.title = say(key);
}

/** The state pill: idle, asking, connecting, live, still, left, reconnecting, failed. */
export function setState(state) {
  const pill = $("state");
  pill.dataset.state = state;
  setWord(pill, state);
}

/** A problem in words, with the server's own text behind it where there is one; no key clears it. */
export function setProblem(key, detail = "") {
  const box = $("problem");
  box.hidden = !key;
  setWord($("problem-word"), key);
  $("problem-detail").textContent = detail;
}

export const milliseconds = (value) => (Number.isFinite(value) ? `${Math.round(value)} ms` : "–");

export function bitrate(bitsPerSecond) {
  if (!Number.isFinite(bitsPerSecond)) return "–";
  return bitsPerSecond >= 1e6 ? `${(bitsPerSecond / 1e6).toFixed(1)} Mb/s` : `${Math.round(bitsPerSecond / 1e3)} kb/s`;
}

/** The reports of one getStats() by a test; `undefined` where there is none. */
export const report = (stats, test) => [...stats.values()].find(test);

export const nominated = (stats) =>
  report(stats, (item) => item.type === "candidate-pair" && item.nominated && item.state === "succeeded");
