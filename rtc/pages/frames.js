// When a picture is shown, and whether what is shown is old.

export const FREEZE_MS = 500; // without a new picture for so long, what is shown is old
const LOOK_MS = 20; // between two looks, in browsers that do not tell

/** Call `shown(count, width, height)` after each picture that `player` shows. */
export function eachFrame(player, shown) {
  if ("requestVideoFrameCallback" in player) {
    const next = (_, metadata) => {
      shown(metadata.presentedFrames, metadata.width, metadata.height);
      player.requestVideoFrameCallback(next);
    };
    return player.requestVideoFrameCallback(next);
  }
  let before = 0;
  const count = () => player.getVideoPlaybackQuality?.().totalVideoFrames ?? player.webkitDecodedFrameCount ?? 0;
  return setInterval(() => {
    const now = count();
    if (now && now !== before && player.videoWidth) shown(now, player.videoWidth, player.videoHeight);
    before = now;
  }, LOOK_MS);
}

/** Judges whether the picture is old, by what is shown here and by what the relay says.

A keyframe that is made for a new viewer while the publisher sends nothing shows the last picture again: to a
browser it is new. So a warning, once given, ends only when the relay says, asked after it began, that pictures
come. Times are milliseconds of one clock. */
export class Freshness {
  constructor() {
    this.reset();
  }

  /** Nothing has been shown yet. */
  reset() {
    this.newest = null; // when the last picture came that is known to be new
    this.last = null; // when the last picture came
    this.heldSince = null; // since when only the relay can end the warning
    this.left = false; // whether the publisher is away
  }

  /** A picture was shown. */
  frame(now) {
    this.last = now;
    if (this.heldSince === null) this.newest = now;
  }

  /** Pictures could not be seen until now: the page was hidden. */
  unhidden(now) {
    if (this.newest !== null && this.heldSince === null) this.newest = now;
  }

  /** What the relay says of the stream, asked at `asked`: its entry, or null where there is none. */
  told(asked, stream) {
    this.left = !stream?.live;
    if (this.left || stream.frozen) {
      this.hold(asked);
      if (this.newest !== null) this.newest = Math.min(this.newest, asked - FREEZE_MS);
    } else if (this.heldSince !== null && asked > this.heldSince) {
      this.heldSince = null;
      this.newest = this.last;
    }
  }

  hold(now) {
    this.heldSince ??= now;
  }

  /** How old the picture is at `now`, in milliseconds, where that is to be warned of; else 0. */
  age(now) {
    if (this.last === null) return 0;
    // A first picture that comes while the relay has none is an old one.
    const age = now - (this.newest ?? this.heldSince - FREEZE_MS);
    if (age <= FREEZE_MS && this.heldSince === null) return 0;
    this.hold(now);
    return Math.max(age, FREEZE_MS);
  }
}
