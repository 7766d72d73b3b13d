"""Who may associate with a storage SCP, what it accepts, and its limits. Default deny.

Never here: I/O, PDUs.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Protocol

from dicom.associate import AssociateRequest
from dicom.negotiation import Rejection

ANY = "*"


class Acceptable(Protocol):
    """What presentation contexts may be accepted; `screen.Rules` is one."""

    def abstract_syntax(self, uid: str) -> bool:
        """Whether objects of this class may come. Verification is accepted in any case."""

    def transfer_syntax(self, uid: str) -> bool:
        """Whether objects may come so encoded."""


@dataclass(frozen=True, slots=True)
class AcceptRule:
    """Who may associate: calling AE title (``*`` for any) and source networks, both must fit."""

    ae_title: str
    networks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a server accepts, and its limits. Nobody is accepted whom no rule names."""

    ae_title: str
    accept: tuple[AcceptRule, ...]
    max_associations: int = 100
    max_associations_per_address: int = 32
    max_pdu: int = 256 * 1024
    """Bytes of the longest P-DATA-TF that peers may send."""
    request_seconds: float = 10.0
    """From the connection to a whole association request."""
    pdu_seconds: float = 60.0
    """From a PDU's first byte to its last."""
    idle_seconds: float = 300.0
    """Without a byte from the peer."""


_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def plain_address(host: str) -> str:
    """An address as rules name it: IPv4 also where a dual-stack socket wraps it in IPv6."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)


class Doorkeeper:
    """The policy's rules, ready to be asked."""

    def __init__(self, policy: Policy) -> None:
        self._ae_title = policy.ae_title.strip()
        self._rules: list[tuple[str, tuple[_Network, ...]]] = [
            (rule.ae_title.strip(), tuple(ipaddress.ip_network(text) for text in rule.networks))
            for rule in policy.accept
        ]

    def decide(self, address: str, request: AssociateRequest) -> Rejection | None:
        """Whether someone at `address` may associate as `request` says; None lets them in."""
        source = ipaddress.ip_address(address)
        known = any(
            title in (ANY, request.calling_ae_title) and any(source in network for network in networks)
            for title, networks in self._rules
        )
        if not known or not request.calling_ae_title:
            return Rejection.CALLING_AE_TITLE
        if request.called_ae_title != self._ae_title:
            return Rejection.CALLED_AE_TITLE
        return None
