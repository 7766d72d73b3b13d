// One WHIP or WHEP session (RFC 9725): an offer is posted, an answer comes back, DELETE ends it.

const GATHERING_MS = 500; // the relay learns our address from our checks anyway: do not wait long

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

function gathered(connection) {
  return new Promise((resolve) => {
    if (connection.iceGatheringState === "complete") return resolve();
    setTimeout(resolve, GATHERING_MS);
    connection.addEventListener("icegatheringstatechange", () => {
      if (connection.iceGatheringState === "complete") resolve();
    });
  });
}

export class Session {
  #headers;
  #location = null;
  #tag = null;

  constructor(url, token, refusals = {}) {
    this.url = url;
    this.refusals = { ...REFUSALS, ...refusals };
    this.#headers = token ? { Authorization: `Bearer ${token}` } : {};
    this.connection = null;
  }

  /** Open it: `prepare(connection)` adds what is sent or received. Throws Refused. */
  async open(prepare, settled) {
    const options = await request(this.url, { method: "OPTIONS" });
    const connection = new RTCPeerConnection({
      iceServers: iceServers(options.headers.get("Link")),
      bundlePolicy: "max-bundle",
    });
    this.connection = connection;
    connection.addEventListener("connectionstatechange", () => settled(connection.connectionState));
    await prepare(connection);
    await connection.setLocalDescription();
    await gathered(connection);
    const answer = await request(this.url, {
      method: "POST",
      headers: { ...this.#headers, "Content-Type": "application/sdp" },
      body: connection.localDescription.sdp,
    });
    const text = await answer.text();
    if (answer.status !== 201) {
      connection.close();
      const [word, retry] = this.refusals[answer.status] ?? ["refused", false];
      throw new Refused(word, word === "refused" ? text.trim().slice(0, 200) : "", retry);
    }
    this.#location = new URL(answer.headers.get("Location"), new URL(this.url, location.href)).href;
    this.#tag = answer.headers.get("ETag");
    connection.addEventListener("icecandidate", (event) => this.#trickle(event.candidate));
    await connection.setRemoteDescription({ type: "answer", sdp: text });
    for (const receiver of connection.getReceivers()) {
      // Pictures that are late are of no use: play what is there.
      if ("jitterBufferTarget" in receiver) receiver.jitterBufferTarget = 0;
    }
  }

  /** A candidate that came after the offer was posted. */
  async #trickle(candidate) {
    if (!candidate?.candidate || !this.#tag) return;
    const sdp = this.connection.localDescription.sdp;
    const line = (name) => new RegExp(`^a=${name}:.*$`, "m").exec(sdp)?.[0].trim();
    const fragment = [line("ice-ufrag"), line("ice-pwd"), "m=audio 9 UDP/TLS/RTP/SAVPF 0",
      `a=mid:${candidate.sdpMid}`, `a=${candidate.candidate}`, ""].join("\r\n");
    const answer = await request(this.#location, {
      method: "PATCH",
      headers: { ...this.#headers, "Content-Type": "application/trickle-ice-sdpfrag", "If-Match": this.#tag },
      body: fragment,
    }).catch(() => null);
    if (answer && !answer.ok) console.warn(`trickle: ${answer.status}`);
  }

  /** End it on both sides. The relay is told first: it ends a session whose connection closes by itself. */
  close() {
    const { connection } = this;
    if (!this.#location) return connection?.close();
    const url = this.#location;
    this.#location = null;
    fetch(url, { method: "DELETE", headers: this.#headers, keepalive: true })
      .catch(() => {
        // The relay notices by itself, a little later, that nobody is there.
      })
      .finally(() => connection.close());
  }
}
