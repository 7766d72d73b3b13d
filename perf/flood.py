"""Floods a DICOM source (HOST PORT AE_TITLE) with CT images until SIGTERM, then prints how many were stored.

A process of its own, so that it takes no time from the benchmark's own threads. One association, each object
sent when the last one was answered: what a busy modality does, and enough to keep both custodies writing.
"""

from __future__ import annotations

import signal
import sys

from dicom.bench_objects import image, new_uid_block
from perf.client import CT_IMAGE_STORAGE, EXPLICIT_LE, Client
from perf.samples import FULL


class _Ended(Exception):
    """SIGTERM came."""


def _end(number: int, frame: object) -> None:
    del number, frame
    raise _Ended


def main(host: str, port: str, ae_title: str) -> None:
    """Store objects of 0.5 MB until SIGTERM."""
    object_ = image(FULL["ct"])
    block, stored = new_uid_block(), 0
    signal.signal(signal.SIGTERM, _end)
    try:
        with Client((host, int(port)), ae_title, [(CT_IMAGE_STORAGE, [EXPLICIT_LE])]) as client:
            while True:
                status = client.store(object_.sop_class, object_.renew(block + stored), object_.data)
                if status:
                    raise SystemExit(f"C-STORE status {status:#06x} after {stored} objects")
                stored += 1
    except _Ended:
        print(stored, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
