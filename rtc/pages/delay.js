// The delay now: each part of the way over the last seconds, from the relay's sums and from what is measured here.

export const NOW_MS = 5000; // what "now" means: long enough for a steady figure, short enough to follow a change

/** The mean of what was added in the last `NOW_MS`; NaN of nothing. */
export class Recent {
  #items = [];

  add(now, value) {
    if (Number.isFinite(value)) this.#items.push({ at: now, value });
  }

  mean(now) {
    this.#items = this.#items.filter((item) => now - item.at <= NOW_MS);
    return this.#items.reduce((sum, item) => sum + item.value, 0) / this.#items.length;
  }

  clear() {
    this.#items = [];
  }
}

/** The mean over the last `NOW_MS` of something that is counted and summed up; NaN where nothing was added. */
export class Slope {
  #items = [];

  add(now, count, sum) {
    if (!Number.isFinite(count) || !Number.isFinite(sum)) return;
    // Both begin anew with another session, or another run of the relay.
    if (count < this.#items.at(-1)?.count) this.#items = [];
    this.#items.push({ at: now, count, sum });
    while (this.#items.length > 2 && now - this.#items[1].at >= NOW_MS) this.#items.shift();
  }

  mean() {
    const first = this.#items[0], last = this.#items.at(-1);
    return last === undefined ? NaN : (last.sum - first.sum) / (last.count - first.count);
  }

  clear() {
    this.#items = [];
  }
}

/** The sum of the parts that are known; NaN where none is. */
export function total(parts) {
  const known = parts.filter(Number.isFinite);
  return known.length ? known.reduce((sum, part) => sum + part, 0) : NaN;
}
