"""x264 with a quantiser of our own for each picture, which FFmpeg's wrapper of it has no way to say.

    planes, QP, keyframe? ─▶ X264.encode ─▶ NAL units

The library is the one that PyAV brings along, called through ctypes by its public interface (x264.h). Its
structures are declared as far as they are used here. `BUILDS` are those in which that was compared; what
opens an encoder has the build in its name, so that another cannot be called by mistake, and
`tests/rtc/test_x264.py` fails where PyAV brings one that is not among them.

An encoder belongs to one thread at a time; the interpreter lock is released while it works.

Never here: which quantiser, which picture is a keyframe, RTP.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from ctypes import POINTER, Structure, byref, c_byte, c_char_p, c_int, c_int64, c_uint32, c_void_p
from typing import NamedTuple, Protocol

import av.codec.context

from relay.errors import MedferryError

BUILDS = (164, 165)
"""Of x264 (``X264_BUILD``), whose structures are as declared here. Newest last."""

CSP_I420 = 2
TYPE_IDR, TYPE_P = 1, 3

MIDDLE_QP, WIDEST_RATIO = 31, 10
"""x264 keeps a quantiser that is forced within those of its three picture types. With this one, and types as
far apart as it allows, that is 11 to 51."""

SIZE_BYTES = 4
"""x264 puts the size of a NAL unit before it where it is told to write no start codes."""

LEVELS = (
    (10, 1_485, 99, 64),
    (11, 3_000, 396, 192),
    (12, 6_000, 396, 384),
    (13, 11_880, 396, 768),
    (20, 11_880, 396, 2_000),
    (21, 19_800, 792, 4_000),
    (22, 20_250, 1_620, 4_000),
    (30, 40_500, 1_620, 10_000),
    (31, 108_000, 3_600, 14_000),
    (32, 216_000, 5_120, 20_000),
    (40, 245_760, 8_192, 20_000),
    (41, 245_760, 8_192, 50_000),
    (42, 522_240, 8_704, 50_000),
    (50, 589_824, 22_080, 135_000),
    (51, 983_040, 36_864, 240_000),
    (52, 2_073_600, 36_864, 240_000),
)
"""level_idc; most macroblocks a second, of one picture; most kbit a second (ITU-T H.264 table A-1)."""


class Plane(NamedTuple):
    """Where a plane of bytes lies: its address, and bytes from one row to the next."""

    address: int
    stride: int


class Picture(Protocol):
    """What is encoded. The memory at its addresses is there as long as it is."""

    @property
    def planes(self) -> tuple[Plane, Plane, Plane]:
        """Y, U and V."""


class _Param(Structure):
    _fields_ = (
        ("cpu", c_uint32),
        ("threads", c_int),
        ("lookahead_threads", c_int),
        ("sliced_threads", c_int),
        ("deterministic", c_int),
        ("cpu_independent", c_int),
        ("sync_lookahead", c_int),
        ("width", c_int),
        ("height", c_int),
        ("rest", c_byte * 8192),
    )


class _Image(Structure):
    _fields_ = (("csp", c_int), ("planes", c_int), ("stride", c_int * 4), ("plane", c_void_p * 4))


class _Picture(Structure):
    _fields_ = (
        ("type", c_int),
        ("qp_plus_1", c_int),
        ("pic_struct", c_int),
        ("keyframe", c_int),
        ("pts", c_int64),
        ("dts", c_int64),
        ("param", c_void_p),
        ("image", _Image),
        ("rest", c_byte * 1024),
    )


class _Nal(Structure):
    _fields_ = (
        ("ref_idc", c_int),
        ("type", c_int),
        ("long_startcode", c_int),
        ("first_mb", c_int),
        ("last_mb", c_int),
        ("size", c_int),
        ("payload", c_void_p),
        ("padding", c_int),
    )


class _Library:
    """The functions that are called, typed; found through `path`, or in a library that it is linked with."""

    def __init__(self, path: str = av.codec.context.__file__) -> None:
        library = ctypes.CDLL(path)
        self.build, opens = next(
            (
                (build, getattr(library, name))
                for build in reversed(BUILDS)
                if hasattr(library, name := f"x264_encoder_open_{build}")
            ),
            (0, None),
        )
        if opens is None:
            builds = " or ".join(map(str, BUILDS))
            raise MedferryError(
                f"PyAV {av.__version__} comes without x264 build {builds}, which encodes H.264: install av "
                "from PyPI's wheels, in the version that pyproject.toml names"
            )
        self.open = opens
        self.open.argtypes, self.open.restype = [POINTER(_Param)], c_void_p
        self.preset = library.x264_param_default_preset
        self.preset.argtypes = [POINTER(_Param), c_char_p, c_char_p]
        self.parse = library.x264_param_parse
        self.parse.argtypes = [POINTER(_Param), c_char_p, c_char_p]
        self.profile = library.x264_param_apply_profile
        self.profile.argtypes = [POINTER(_Param), c_char_p]
        self.picture = library.x264_picture_init
        self.picture.argtypes, self.picture.restype = [POINTER(_Picture)], None
        self.encode = library.x264_encoder_encode
        self.encode.argtypes = [
            c_void_p,
            POINTER(POINTER(_Nal)),
            POINTER(c_int),
            POINTER(_Picture),
            POINTER(_Picture),
        ]
        self.close = library.x264_encoder_close
        self.close.argtypes, self.close.restype = [c_void_p], None


_library = functools.cache(_Library)


class X264Error(MedferryError):
    """x264 failed; make a new encoder."""


def level(width: int, height: int, rate: int, bitrate: int) -> int:
    """level_idc of the lowest level that allows for so many pixels, pictures a second and bits a second; the
    highest where none does."""
    macroblocks = -(-width // 16) * -(-height // 16)
    for idc, a_second, a_picture, kilobits in LEVELS:
        if macroblocks <= a_picture and macroblocks * rate <= a_second and bitrate <= 1000 * kilobits:
            return idc
    return LEVELS[-1][0]


class X264:
    """An encoder of one size: constrained baseline, no look-ahead, parameter sets before each keyframe."""

    def __init__(self, *, width: int, height: int, rate: int, bitrate: int, preset: str, slices: int) -> None:
        """
        Args:
            width: Pixels, even.
            height: Pixels, even.
            rate: Pictures a second, for the level only.
            bitrate: Bits a second, for the level only.
            preset: Of x264, such as ``ultrafast``.
            slices: Of each picture, each encoded by a thread of its own; in the caller's where it is one.

        Raises:
            X264Error: x264 refuses these.
            MedferryError: PyAV has no x264 that we know.
        """
        self._library = library = _library()
        param = _Param()
        settings = {
            "qp": MIDDLE_QP,
            "ipratio": WIDEST_RATIO,
            "pbratio": WIDEST_RATIO,
            "threads": slices,
            "sliced-threads": 1,
            "lookahead-threads": 1,
            "level": level(width, height, rate, bitrate),
            "fps": f"{rate}/1",
            "force-cfr": 1,
            "keyint": "infinite",
            "scenecut": 0,
            "bframes": 0,
            "aud": 0,
            "annexb": 0,
            "repeat-headers": 1,
            "log": -1,
        }
        failed = library.preset(byref(param), preset.encode(), b"zerolatency")
        param.width, param.height = width, height
        for name, value in settings.items():
            failed = failed or library.parse(byref(param), name.encode(), str(value).encode())
        failed = failed or library.profile(byref(param), b"baseline")
        self._encoder = None if failed else library.open(byref(param))
        if self._encoder is None:
            raise X264Error(f"x264 cannot encode {width}x{height} with preset {preset} in {slices} slices")
        # At the interpreter's end a thread may still be in the encoder.
        weakref.finalize(self, library.close, self._encoder).atexit = False
        self._in, self._out = _Picture(), _Picture()
        library.picture(byref(self._in))
        self._in.image.csp, self._in.image.planes = CSP_I420, 3
        self._nals, self._count = POINTER(_Nal)(), c_int()

    def encode(self, picture: Picture, qp: int, *, keyframe: bool) -> list[bytes]:
        """The NAL units of one picture, in decoding order, without start codes.

        Args:
            picture: Of this encoder's size; it is only read, and not kept.
            qp: 11 to 51; the next one within is taken for what is outside.
            keyframe: Make it an IDR picture; else it refers to the one before.

        Raises:
            X264Error: x264 failed; make a new encoder.
        """
        given = self._in
        given.type = TYPE_IDR if keyframe else TYPE_P
        given.qp_plus_1 = qp + 1
        given.pts += 1
        for number, plane in enumerate(picture.planes):
            given.image.plane[number], given.image.stride[number] = plane
        size = self._library.encode(
            self._encoder, byref(self._nals), byref(self._count), byref(given), byref(self._out)
        )
        if size <= 0:
            raise X264Error(f"x264 failed to encode a picture ({size})")
        nals = self._nals[: self._count.value]
        return [ctypes.string_at(nal.payload + SIZE_BYTES, nal.size - SIZE_BYTES) for nal in nals]
