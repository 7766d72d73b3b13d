// The stamp of rtc/stamp.py for browsers: 16 × 8 cells, one cell in from the top left corner of a picture
// of 80 × 45 cells. Row 0 is the sync word, then 48 bits of microseconds, 32 bits of counter, CRC-32.

const GRID_COLUMNS = 80, GRID_ROWS = 45, COLUMNS = 16, ROWS = 8;
const SYNC = 0b1010110001110100;
const MIN_CONTRAST = 60, MARGIN = 0.15;
const CELL = 8; // pixels of a cell in the reader's own small picture

const TABLE = Uint32Array.from({ length: 256 }, (_, index) => {
  let value = index;
  for (let bit = 0; bit < 8; bit += 1) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

function crc32(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) value = TABLE[(value ^ byte) & 0xff] ^ (value >>> 8);
  return (value ^ 0xffffffff) >>> 0;
}

function encode(microseconds, counter) {
  const code = new Uint8Array(16);
  const view = new DataView(code.buffer);
  view.setUint16(0, SYNC);
  view.setUint16(2, Math.floor(microseconds / 2 ** 32) % 2 ** 16);
  view.setUint32(4, microseconds % 2 ** 32);
  view.setUint32(8, counter);
  view.setUint32(12, crc32(code.subarray(2, 12)));
  return code;
}

/** Paint a stamp into a 2D context that shows a picture of `width` × `height`. */
export function paint(context, width, height, microseconds, counter) {
  const code = encode(microseconds, counter);
  const x = (column) => Math.round(((1 + column) * width) / GRID_COLUMNS);
  const y = (row) => Math.round(((1 + row) * height) / GRID_ROWS);
  for (let row = 0; row < ROWS; row += 1) {
    for (let column = 0; column < COLUMNS; column += 1) {
      const index = row * COLUMNS + column;
      context.fillStyle = (code[index >> 3] >> (7 - (index & 7))) & 1 ? "#ececec" : "#141414";
      context.fillRect(x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row));
    }
  }
}

/** Read the stamp of a video or canvas: `{ microseconds, counter }`, or null where there is none. */
export class StampReader {
  constructor() {
    this.canvas = new OffscreenCanvas(COLUMNS * CELL, ROWS * CELL);
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
  }

  read(picture, width, height) {
    const cellWidth = width / GRID_COLUMNS, cellHeight = height / GRID_ROWS;
    if (cellWidth < 2 || cellHeight < 2) return null;
    this.context.drawImage(picture, cellWidth, cellHeight, COLUMNS * cellWidth, ROWS * cellHeight,
      0, 0, COLUMNS * CELL, ROWS * CELL);
    const pixels = this.context.getImageData(0, 0, COLUMNS * CELL, ROWS * CELL).data;
    const levels = new Float32Array(COLUMNS * ROWS);
    for (let index = 0; index < levels.length; index += 1) levels[index] = cellMean(pixels, index);
    return decode(levels);
  }
}

function cellMean(pixels, index) {
  const left = (index % COLUMNS) * CELL, top = Math.floor(index / COLUMNS) * CELL;
  let sum = 0;
  for (let y = CELL / 4; y < (3 * CELL) / 4; y += 1) {
    for (let x = CELL / 4; x < (3 * CELL) / 4; x += 1) {
      const at = 4 * ((top + y) * COLUMNS * CELL + left + x);
      sum += 0.299 * pixels[at] + 0.587 * pixels[at + 1] + 0.114 * pixels[at + 2];
    }
  }
  return sum / (CELL / 2) ** 2;
}

function decode(levels) {
  let black = 0, white = 0;
  const whites = SYNC.toString(2).split("1").length - 1;
  for (let column = 0; column < COLUMNS; column += 1) {
    if ((SYNC >> (15 - column)) & 1) white += levels[column] / whites;
    else black += levels[column] / (COLUMNS - whites);
  }
  const contrast = white - black;
  if (contrast < MIN_CONTRAST) return null;
  const code = new Uint8Array(16);
  for (let index = 0; index < levels.length; index += 1) {
    const level = (levels[index] - black) / contrast - 0.5;
    if (Math.abs(level) < MARGIN) return null;
    if (level > 0) code[index >> 3] |= 0x80 >> (index & 7);
  }
  const view = new DataView(code.buffer);
  if (view.getUint16(0) !== SYNC || view.getUint32(12) !== crc32(code.subarray(2, 12))) return null;
  return { microseconds: view.getUint16(2) * 2 ** 32 + view.getUint32(4), counter: view.getUint32(8) };
}

const WRAP = 2 ** 48;

/** Microseconds since a stamp was painted by this clock; stamps count modulo 2**48, nine years. */
export function age(stamp) {
  const passed = (wallMicroseconds() - stamp.microseconds) % WRAP;
  return passed > WRAP / 2 ? passed - WRAP : passed;
}

/** The wall clock in microseconds, with the resolution that browsers give. */
export const wallMicroseconds = () => Math.round((performance.timeOrigin + performance.now()) * 1000);
