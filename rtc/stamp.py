"""A machine-readable stamp in a picture: when it was painted, and which picture it is.

It measures glass to glass what no protocol can carry across the relay, since only pictures cross. The code
is 16 × 8 cells, each black or white, one cell in from the top left corner of the picture; a cell is 1/80 of
the width and 1/45 of the height, so the reader finds it at any scale (16 × 16 pixels at 1280 × 720):

    row 0      sync     1010 1100 0111 0100, which also says what black and white are now
    rows 1-3   time     48 bits, microseconds
    rows 4-5   counter  32 bits, the picture's number
    rows 6-7   CRC-32   of the ten bytes above

Bits run left to right, most significant first. A reader takes the mean of each cell's middle, refuses cells
that are neither black nor white, and believes only a code whose sync and CRC both hold.
`pages/stamp.js` is the same code for browsers.

Never here: clocks (the caller says what time it is).
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Plane: TypeAlias = NDArray[np.uint8]

GRID_COLUMNS, GRID_ROWS = 80, 45
"""Cells that the whole picture would hold."""

COLUMNS, ROWS = 16, 8
"""Cells of the code."""

SYNC = 0b1010_1100_0111_0100

BLACK, WHITE, GREY = 40, 215, 128
"""Luma of cells, inside the legal range with room for ringing; GREY is chroma without colour."""

MIN_CONTRAST = 60.0
"""Luma between the sync row's mean black and mean white below which nothing is believed."""

MARGIN = 0.15
"""Share of the contrast on both sides of the middle where a cell counts as neither black nor white."""

SAMPLES = 4
"""Points a cell and axis that the reader takes, spread over the middle half of the cell."""

MIN_WIDTH, MIN_HEIGHT = 2 * GRID_COLUMNS, 2 * GRID_ROWS
"""Smallest picture with two pixels a cell; smaller ones cannot hold a stamp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What a picture says of itself. `time_us` is microseconds modulo 2**48, `counter` modulo 2**32."""

    time_us: int
    counter: int

    def bits(self) -> NDArray[np.uint8]:
        """The code as ROWS × COLUMNS zeros and ones."""
        message = (self.time_us % 2**48).to_bytes(6, "big") + (self.counter % 2**32).to_bytes(4, "big")
        code = SYNC.to_bytes(2, "big") + message + zlib.crc32(message).to_bytes(4, "big")
        return np.unpackbits(np.frombuffer(code, np.uint8)).reshape(ROWS, COLUMNS)


def _edges(cells: int, size: int, grid: int) -> list[int]:
    """Pixel where each of the code's cells begins along one axis, and where the last ends."""
    return [round((1 + index) * size / grid) for index in range(cells + 1)]


@functools.lru_cache(maxsize=16)
def _spread(width: int, height: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """For each pixel row and column of the code's area, the code's row and column it shows."""
    rows, columns = _edges(ROWS, height, GRID_ROWS), _edges(COLUMNS, width, GRID_COLUMNS)
    return np.repeat(np.arange(ROWS), np.diff(rows)), np.repeat(np.arange(COLUMNS), np.diff(columns))


@functools.lru_cache(maxsize=16)
def _points(width: int, height: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Pixel rows and columns that the reader looks at, SAMPLES for each cell."""
    inside = 0.25 + 0.5 * (np.arange(SAMPLES) + 0.5) / SAMPLES
    rows = (1 + np.add.outer(np.arange(ROWS), inside).ravel()) * height / GRID_ROWS
    columns = (1 + np.add.outer(np.arange(COLUMNS), inside).ravel()) * width / GRID_COLUMNS
    return rows.astype(np.intp)[:, None], columns.astype(np.intp)[None, :]


def paint(luma: Plane, chroma: tuple[Plane, ...], stamp: Stamp) -> None:
    """Paint `stamp` into a yuv420p picture, in place.

    Args:
        luma: Height × width.
        chroma: U and V, each half as high and wide, rounded up; may be empty for a grey picture.
        stamp: What to paint.

    Raises:
        ValueError: The picture is smaller than MIN_WIDTH × MIN_HEIGHT.
    """
    height, width = luma.shape
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        raise ValueError(f"{width}x{height} is too small for a stamp: at least {MIN_WIDTH}x{MIN_HEIGHT}")
    rows, columns = _spread(width, height)
    top, left = round(height / GRID_ROWS), round(width / GRID_COLUMNS)
    cells = np.where(stamp.bits(), np.uint8(WHITE), np.uint8(BLACK))
    luma[top : top + len(rows), left : left + len(columns)] = cells[rows[:, None], columns[None, :]]
    for plane in chroma:
        plane[top // 2 : (top + len(rows) + 1) // 2, left // 2 : (left + len(columns) + 1) // 2] = GREY


def read(luma: NDArray[Any]) -> Stamp | None:
    """The stamp in a picture's luma plane (height × width), or None where there is none to believe."""
    height, width = luma.shape
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        return None
    points = luma[_points(width, height)].astype(np.float32)
    means = points.reshape(ROWS, SAMPLES, COLUMNS, SAMPLES).mean(axis=(1, 3))
    sync = np.unpackbits(np.frombuffer(SYNC.to_bytes(2, "big"), np.uint8)).astype(bool)
    black, white = float(means[0, ~sync].mean()), float(means[0, sync].mean())
    contrast = white - black
    if contrast < MIN_CONTRAST:
        return None
    levels = (means - black) / contrast - 0.5
    if np.abs(levels).min() < MARGIN:
        return None
    code = np.packbits(levels > 0).tobytes()
    message, check = code[2:12], code[12:16]
    if int.from_bytes(code[:2], "big") != SYNC or zlib.crc32(message).to_bytes(4, "big") != check:
        return None
    return Stamp(time_us=int.from_bytes(message[:6], "big"), counter=int.from_bytes(message[6:], "big"))
