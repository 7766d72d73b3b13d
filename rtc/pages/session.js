// One WHIP or WHEP session (RFC 9725): an offer is posted, an answer comes back, DELETE ends it; and what keeps
// such a session up for as long as the user wants it.

const TRICKLE_MS = 50; // candidates of so long are told together
const LEAVE_MS = 2000; // the longest that a new session waits for the end of the one before

/** A refusal, as the key of a word; `retry` says whether trying again can help. */
export class Refused extends Error {
  constructor(word, detail, retry) {
    super(detail);
    this.word = word;
    this.retry = retry;
  }
}

const REFUSALS = {
  401: ["wrongToken", false],
  403: ["wrongToken", false],
  404: ["unknownStream", true],
  409: ["notLive", true],
  503: ["full", true],
};

function iceServers(header) {
  const servers = [];
  for (const part of (header ?? "").split(/,\s*(?=<)/)) {
    const url = /^<([^>]+)>/.exec(part)?.[1];
    if (!url || !/rel="?ice-server"?/.test(part)) continue;
    const value = (name) => new RegExp(`${name}="((?:[^"\\\\]|\\\\.)*)"`).exec(part)?.[1].replace(/\\(.)/g, "$1");
    servers.push({ urls: url, username: value("username"), credential: value("credential") });
  }
  return servers;
}

async function request(url, options) {
  try {
    return await fetch(url, { ...options, cache: "no-store" });
  } catch (error) {
    if (error instanceof TypeError) throw new Refused("unreachable", "", true);
    throw error;
  }
}

export class Session {
  #headers;
  #location = null;
  #tag = null;
  #posted = null; // the POST under way or done
  #closing = null; // the end under way or done
  #candidates = []; // gathered, not told yet

  constructor(url, token, refusals = {}) {
    this.url = url;
    this.refusals = { ...REFUSALS, ...refusals };
    this.#headers = token ? { Authorization: `Bearer ${token}` } : {};
    this.connection = null;
  }

  /** Open it: `prepare(connection)` adds what is sent or received. Throws Refused; returns early if closed. */
  async open(prepare, settled) {
    const connection = new RTCPeerConnection({ bundlePolicy: "max-bundle" });
    this.connection = connection;
    connection.addEventListener("connectionstatechange", () => settled(connection.connectionState));
    connection.addEventListener("icecandidate", (event) => this.#gathered(event.candidate));
    prepare(connection);
    try {
      const offer = await connection.createOffer();
      if (this.#closing) return;
      this.#posted = this.#post(offer.sdp);
      const { sdp, iceServers } = await this.#posted;
      if (this.#closing) return;
      // The relay names ICE servers with its answer only, and gathering begins with the local description.
      if (iceServers.length) connection.setConfiguration({ bundlePolicy: "max-bundle", iceServers });
      await connection.setLocalDescription(offer);
      await connection.setRemoteDescription({ type: "answer", sdp });
    } catch (error) {
      if (this.#closing) return;
      connection.close();
      throw error;
    }
    for (const receiver of connection.getReceivers()) {
      // Pictures that are late are of no use: play what is there.
      if ("jitterBufferTarget" in receiver) receiver.jitterBufferTarget = 0;
    }
  }

  async #post(offer) {
    const headers = { ...this.#headers, "Content-Type": "application/sdp" };
    const answer = await request(this.url, { method: "POST", headers, body: offer });
    const text = await answer.text();
    if (answer.status !== 201) {
      const [word, retry] = this.refusals[answer.status] ?? ["refused", false];
      throw new Refused(word, word === "refused" ? text.trim().slice(0, 200) : "", retry);
    }
    this.#location = new URL(answer.headers.get("Location"), new URL(this.url, location.href)).href;
    this.#tag = answer.headers.get("ETag");
    return { sdp: text, iceServers: iceServers(answer.headers.get("Link")) };
  }

  #gathered(candidate) {
    if (!candidate?.candidate || this.#closing) return;
    this.#candidates.push(candidate);
    if (this.#candidates.length === 1) setTimeout(() => this.#trickle(), TRICKLE_MS);
  }

  /** Tell the candidates of the last moments in one request (RFC 9725 §4.3.2). */
  async #trickle() {
    const candidates = this.#candidates.splice(0);
    if (!this.#tag || this.#closing) return;
    const sdp = this.connection.localDescription.sdp;
    const line = (name) => new RegExp(`^a=${name}:.*$`, "m").exec(sdp)?.[0].trim();
    const fragment = [line("ice-ufrag"), line("ice-pwd"), "m=audio 9 UDP/TLS/RTP/SAVPF 0",
      `a=mid:${candidates[0].sdpMid}`, ...candidates.map((item) => `a=${item.candidate}`), ""].join("\r\n");
    const answer = await request(this.#location, {
      method: "PATCH",
      headers: { ...this.#headers, "Content-Type": "application/trickle-ice-sdpfrag", "If-Match": this.#tag },
      body: fragment,
    }).catch(() => null);
    if (answer && !answer.ok && !this.#closing) console.warn(`trickle: ${answer.status}`);
  }

  /** End it on both sides, from whatever state; settles when its place is free. */
  close() {
    this.#closing ??= this.#end();
    return this.#closing;
  }

  async #end() {
    // The relay is told first: it ends a session whose connection closes by itself.
    if (!this.#location) {
      this.connection?.close();
      // While an offer is under way nobody knows yet where the session will be; it must not stay.
      await this.#posted?.catch(() => {});
    }
    if (this.#location) {
      await fetch(this.#location, { method: "DELETE", headers: this.#headers, keepalive: true }).catch(() => {
        // The relay notices by itself, a little later, that nobody is there.
      });
    }
    this.connection?.close();
  }
}

let leaving = Promise.resolve(); // the end of the last session of this page

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Keeps one session up: opens it, and again after every loss, until it is ended.

`told(state, word, detail)` hears connecting, live, reconnecting and failed, with the problem as the key of a
word where there is one. */
export class Keeper {
  #options;
  #session = null;
  #ended = false;
  #timer = 0;
  #retryMs;

  constructor({ url, token, refusals, prepare, told, firstRetryMs, lastRetryMs }) {
    this.#options = { url, token, refusals, prepare, told, firstRetryMs, lastRetryMs };
    this.#retryMs = firstRetryMs;
  }

  /** The connection while it is up, or null. */
  get connection() {
    const connection = this.#session?.connection;
    return connection?.connectionState === "connected" ? connection : null;
  }

  async open(state = "connecting") {
    const { url, token, refusals, prepare, told } = this.#options;
    told(state);
    // The place of one that was just left may be the very one that is asked for.
    await Promise.race([leaving, pause(LEAVE_MS)]);
    if (this.#ended) return;
    const mine = new Session(url, token, refusals);
    this.#session = mine;
    try {
      await mine.open(prepare, (settled) => this.#session === mine && this.#follow(settled));
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (this.#session !== mine) return;
      if (error.retry) return this.#again(error.word, error.message);
      this.end();
      told("failed", error.word, error.message);
    }
  }

  #follow(state) {
    if (state === "connected") {
      this.#retryMs = this.#options.firstRetryMs;
      this.#options.told("live");
    } else if (state === "failed" || state === "disconnected" || state === "closed") {
      this.#again("lostConnection");
    }
  }

  #again(word, detail) {
    this.#leave();
    this.#options.told("reconnecting", word, detail);
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.open("reconnecting"), this.#retryMs);
    this.#retryMs = Math.min(2 * this.#retryMs, this.#options.lastRetryMs);
  }

  #leave() {
    if (this.#session) leaving = this.#session.close();
    this.#session = null;
  }

  /** Leave for good. */
  end() {
    this.#ended = true;
    clearTimeout(this.#timer);
    this.#leave();
  }
}
