"""The errors of medferry, as a tree.

    MedferryError
    ├── ConfigError       the configuration file is wrong; carries every problem found
    ├── RecordError       a record breaks its own limits (raised on construction, on both sides)
    ├── WireError         a fragment is not what the link may carry; the fragment is dropped
    ├── SpoolError        the spool cannot do what was asked
    │   └── SpoolFull     a named bound is reached: refuse, do not wait
    └── PeerError         a remote peer broke its protocol; closes one association or stream

A peer's fault is data: it is caught at the edge, counted and logged, and ends one association or stream. Any
other error is ours and ends the worker, which the supervisor restarts. Messages are for people and say what
happened, to which peer or object, and what to do; they never hold patient data.
"""

from __future__ import annotations

import os


class MedferryError(Exception):
    """Root of all errors that medferry raises on purpose."""


class ConfigError(MedferryError):
    """The configuration cannot be used. `problems` has one line each: `where: what: what to write`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class RecordError(MedferryError):
    """A record is out of its limits. Raised by the record's own constructor, on both sides alike."""


class WireError(MedferryError):
    """A fragment was refused by the codec. `reason` is one of the counters of the link."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class SpoolError(MedferryError):
    """The spool cannot do what was asked (unknown object, damaged index)."""


class SpoolFull(SpoolError):
    """A bound of the spool is reached. `bound` names it: ``bytes``, ``objects``, ``disk``,
    ``quarantine``, or ``object``: one alone is too large."""

    def __init__(self, bound: str, detail: str) -> None:
        super().__init__(detail)
        self.bound = bound


class PeerError(MedferryError):
    """A remote peer broke its protocol. `reason` is a short fixed word for counters and logs."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def os_reason(error: OSError) -> str:
    """What the system says of `error`: the event loop's own words name the call and the address instead."""
    # Errors of the resolver and of TLS, which have classes of their own, have other numbers.
    if error.errno is not None and type(error).__module__ == OSError.__module__:
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__
