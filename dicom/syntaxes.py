"""How each transfer syntax encodes a data set (PS3.5 Annex A), as one table.

Never here: which of them a lane accepts (see `screen.py`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """What a parser must know of a transfer syntax.

    `encapsulated` says whether top-level Pixel Data is in fragments: always, never, or, where the syntax is
    private and says nothing, either (None).
    """

    implicit: bool = False
    big_endian: bool = False
    deflated: bool = False
    encapsulated: bool | None = False


IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
DEFLATED_LITTLE = "1.2.840.10008.1.2.1.99"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"

_ENCAPSULATED = (
    "1.2.840.10008.1.2.1.98",  # encapsulated uncompressed
    *(f"1.2.840.10008.1.2.4.{n}" for n in range(50, 67)),  # JPEG, its retired processes included
    "1.2.840.10008.1.2.4.70",  # JPEG lossless SV1
    "1.2.840.10008.1.2.4.80",  # JPEG-LS
    "1.2.840.10008.1.2.4.81",
    *(f"1.2.840.10008.1.2.4.{n}" for n in range(90, 94)),  # JPEG 2000
    *(f"1.2.840.10008.1.2.4.{n}{f}" for n in range(100, 107) for f in ("", ".1")),  # MPEG2, MPEG-4
    "1.2.840.10008.1.2.4.107",  # HEVC
    "1.2.840.10008.1.2.4.108",
    *(f"1.2.840.10008.1.2.4.{n}" for n in range(110, 113)),  # JPEG XL
    *(f"1.2.840.10008.1.2.4.{n}" for n in range(201, 204)),  # HTJ2K
    "1.2.840.10008.1.2.5",  # RLE
    "1.2.840.10008.1.2.8.1",  # deflated image frame
)

ENCODINGS: dict[str, Encoding] = {
    IMPLICIT_LITTLE: Encoding(implicit=True),
    EXPLICIT_LITTLE: Encoding(),
    DEFLATED_LITTLE: Encoding(deflated=True),
    EXPLICIT_BIG: Encoding(big_endian=True),
    "1.2.840.10008.1.2.4.94": Encoding(),  # JPIP referenced: no pixels in the object
    "1.2.840.10008.1.2.4.95": Encoding(deflated=True),
    "1.2.840.10008.1.2.4.204": Encoding(),  # JPIP HTJ2K referenced
    "1.2.840.10008.1.2.4.205": Encoding(deflated=True),
    "1.2.840.113619.5.2": Encoding(implicit=True),  # GE: implicit little endian, pixels big endian
    **{uid: Encoding(encapsulated=True) for uid in _ENCAPSULATED},
}
"""Every transfer syntax an object may be stored in. Not here: MIME, XML, Papyrus and the live SMPTE streams,
which encode no data set that C-STORE carries."""

PRIVATE = Encoding(encapsulated=None)
"""A private syntax that a lane's allow-list names: explicit little endian, as PS3.5 §A.4 has compression."""


def encoding_of(transfer_syntax: str) -> Encoding:
    """The encoding of `transfer_syntax`; one that is not in the table is taken for `PRIVATE`."""
    return ENCODINGS.get(transfer_syntax, PRIVATE)
