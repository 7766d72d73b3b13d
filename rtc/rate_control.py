"""Which quantiser the next H.264 picture gets, so that a stream keeps to its bitrate. Pure.

    elapsed, keyframe? ─▶ quantiser() ─▶ QP ─▶ encoder ─▶ bytes ─┬─ fits() no ─▶ again, as a keyframe
                              ▲                                  └─ fits() yes ─▶ made()
                              └────────────── how complex pictures are ◀────────────┘

A picture takes about ``complexity / 2^(QP/6)`` bytes: the quantiser's step doubles every six (ITU-T H.264
§8.5.8). How complex the next one is, is told by those before it, keyframes and others apart. What it may take
is the bitrate's share of one picture, more where less was used before, and less while a bucket that drains at
the bitrate is filled.

x264 can do this itself, and knows more: it looks at a picture at half its size before it encodes it. That
takes a quarter of its time for each (`docs/performance.md`), to foresee what happens rarely: a picture unlike
the one before it. Such a one is encoded twice here instead. What came out too large is not sent, and a
keyframe of the right size is: nothing after it refers to what nobody got.

Never here: codecs, clocks, threads.
"""

from __future__ import annotations

import math

LEAST_QP = 13
"""Finer is not seen: the error is a step of grey or two (49 to 50 dB), and what would be spent on a still
picture is spent on the first one that moves."""

MOST_QP = 51

KEYFRAME_PICTURES = 3.0
"""A keyframe may be this many times as large as the bitrate's share of one picture. At 4 Mb/s and 30 pictures
a second that is 50 KB: a few milliseconds on any network that carries the stream at all."""

MOST_PICTURES = 6.0
"""A picture with which more than so many shares would be on their way is encoded again. They are a fifth of a
second at 30 pictures a second."""

MISJUDGED = 1.5
"""A keyframe that is this many times as large as it may be is encoded again."""

LONGEST_PAUSE_SHARES = 30.0
"""What drains from the bucket in a pause, at most."""

FINER_BY, COARSER_BY = 1.4, 0.9
"""The quantiser stays where it is unless it is so far off: a picture's grain should not pulse."""

FINER_STEP, KEYFRAME_STEP, COARSER_STEP = 1, 3, 6
"""It changes by so much from one picture to the next, at most: the finer it gets at once, the more of what
was left out before is sent at once; and coarser pictures have most of what they show from the ones before,
so that they come out smaller than was foreseen. By the second for a keyframe, since one much finer than its
neighbours would be seen as a beat."""

USUAL, CHANGED, SURGED = 0.25, 0.08, 0.6
"""Weight of a picture for how complex the next one is. Less where the quantiser changed: a finer picture also
has what the one before left out, a coarser one has it for nothing. More where it is not explained by that."""

SURGE = 2.0
"""Such a picture is this many times as large as expected."""

FILLED_SHARES = 1.0
"""How full the bucket is when a picture may take just its share."""

CATCH_UP = 0.1
"""How much of what the bucket is off from that the next picture makes up for."""

LEAST_SHARE, MOST_SHARE = 0.4, 1.2
"""What a picture that is no keyframe may take, in shares."""

PATIENCE, MOST_PATIENCE = 60, 54_000
"""A still picture gets finer step by step. Where a step turns out to be too much, it is not tried again for
so many pictures, and for twice as many each time, up to half an hour of them: it would begin anew, as a
keyframe, again and again. It may be that it just changed, so it is tried again."""

MOVING_SHARE, MOVED_PICTURES, RETRY = 0.1, 30, 1.25
"""It is tried sooner if so many pictures had so much to show, or the bitrate has so many times its value."""

FIRST_KEYFRAME = 1.4
"""Complexity of a first keyframe for each of its pixels: a camera's, at a medium amount of detail."""

PICTURE_TO_KEYFRAME = 0.25
"""Complexity of the first other picture, in parts of its keyframe's."""


class RateControl:
    """The bucket and the two complexities of one encoder. Bytes throughout, but for `bitrate`."""

    def __init__(self, bitrate: int, rate: float, pixels: int) -> None:
        """
        Args:
            bitrate: Bits per second to keep to.
            rate: Pictures a second.
            pixels: Of one picture.
        """
        self._rate = rate
        self._filled = self._tried_share = 0.0
        self.set_bitrate(bitrate)
        self._keyframe = FIRST_KEYFRAME * pixels
        self._other = 0.0
        self._last, self._qp = 0, LEAST_QP
        self._refreshed = False
        """Whether the last picture was."""

    def set_bitrate(self, bitrate: int) -> None:
        """Keep to `bitrate` bits per second from the next picture on."""
        self._share = bitrate / 8 / self._rate
        if self._share >= RETRY * self._tried_share:
            self._try_all()
        self._filled = min(self._filled, KEYFRAME_PICTURES * self._share)

    def _try_all(self) -> None:
        self._finest, self._waits, self._patience, self._moved = LEAST_QP, 0, PATIENCE, 0

    def elapse(self, seconds: float) -> None:
        """Let the bucket drain for what lies between two pictures."""
        shares = min(seconds * self._rate, LONGEST_PAUSE_SHARES)
        self._filled = max(0.0, self._filled - shares * self._share)

    def quantiser(self, *, keyframe: bool, refreshed: bool) -> int:
        """For the next picture.

        Args:
            keyframe: It is to be one.
            refreshed: It differs from the one before it all over, as where the publisher had a keyframe. One
                after another of these, they are usual pictures.
        """
        if keyframe:
            wanted = self._ideal(self._keyframe, self._keyframe_room)
            return max(round(wanted), self._qp - KEYFRAME_STEP)
        if refreshed and not self._refreshed:
            wanted = self._ideal(max(self._other, self._keyframe), self._keyframe_room)
            return max(round(wanted), self._qp - FINER_STEP)
        room = self._room
        wanted = self._ideal(self._other, room)
        if wanted <= self._qp - FINER_BY:
            return max(round(wanted), self._qp - FINER_STEP)
        if wanted >= self._qp + COARSER_BY and self._last > room:
            return min(round(wanted), self._qp + COARSER_STEP)
        return self._qp

    @property
    def _keyframe_room(self) -> float:
        """What the next picture may take if it shows all anew."""
        return max(KEYFRAME_PICTURES * self._share - self._filled, MOST_SHARE * self._share)

    @property
    def _room(self) -> float:
        """What it may take else."""
        wanted = self._share + CATCH_UP * (FILLED_SHARES * self._share - self._filled)
        return min(max(wanted, LEAST_SHARE * self._share), MOST_SHARE * self._share)

    def _ideal(self, complexity: float, size: float) -> float:
        return min(max(6 * math.log2(max(complexity, 1.0) / size), self._finest), MOST_QP)

    def fits(self, size: int, qp: int, *, keyframe: bool) -> bool:
        """Whether a picture that came out with `size` bytes may be sent. If not, encode it again, as a
        keyframe, with what `quantiser` then says."""
        if qp >= MOST_QP:
            return True
        if keyframe:
            fits = size <= MISJUDGED * self._keyframe_room
        else:
            fits = size <= max(MOST_PICTURES * self._share - self._filled, KEYFRAME_PICTURES * self._share)
        if not fits:
            # So much it takes to show the picture without the one before it; and the next may be as new.
            self._keyframe = size * 2 ** (qp / 6)
            if not keyframe:
                self._other += SURGED * (self._keyframe - self._other)
                if qp < self._qp:
                    self._finest, self._moved, self._tried_share = qp + 1, 0, self._share
                    self._waits, self._patience = self._patience, min(2 * self._patience, MOST_PATIENCE)
        return fits

    def made(self, size: int, qp: int, *, keyframe: bool, refreshed: bool) -> None:
        """A picture is sent: learn from it."""
        finer, coarser = qp < self._qp, qp > self._qp
        self._filled = min(self._filled + size, MOST_PICTURES * self._share)
        self._last, self._qp = size, qp
        after_refreshed, self._refreshed = self._refreshed, refreshed
        complexity = size * 2 ** (qp / 6)
        self._waits -= 1
        if self._waits <= 0:
            self._finest = LEAST_QP
        if keyframe:
            self._keyframe = complexity
            self._other = self._other or PICTURE_TO_KEYFRAME * complexity
        elif refreshed and not after_refreshed:
            weight = SURGED if complexity > SURGE * self._keyframe else USUAL
            self._keyframe += weight * (complexity - self._keyframe)
        else:
            surged = complexity > SURGE * self._other and not finer
            self._moved += size >= MOVING_SHARE * self._share
            if self._moved >= MOVED_PICTURES:
                self._try_all()
            weight = SURGED if surged else CHANGED if finer or coarser else USUAL
            self._other += weight * (complexity - self._other)
