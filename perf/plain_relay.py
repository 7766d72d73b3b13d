"""A relay as pynetdicom's users write it, to compare with: ``plain_relay.py PORT HOST PORT AE``.

One storage SCP whose handler sends each instance on over one association that is kept open. Nothing is
crippled: PDUs are as large as the others' and logging is off. Nothing is queued either: the sender hears what
the destination said.
"""

from __future__ import annotations

import sys
import threading

from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.presentation import AllStoragePresentationContexts, StoragePresentationContexts

MAX_PDU = 131072

UNABLE_TO_PROCESS = 0xC211
"""C-STORE status: the destination could not be reached or did not answer."""


class Forwarder:
    """The kept association to the destination; one instance at a time."""

    def __init__(self, host: str, port: int, ae_title: str) -> None:
        self._to = (host, port, ae_title)
        self._ae = AE("RELAY")
        self._ae.maximum_pdu_size = MAX_PDU
        self._ae.requested_contexts = StoragePresentationContexts
        self._association: Association | None = None
        self._lock = threading.Lock()

    def store(self, event: evt.Event) -> int:
        """EVT_C_STORE: send the instance on, answer with the destination's status."""
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        with self._lock:
            association = self._association
            if association is None or not association.is_established:
                host, port, ae_title = self._to
                association = self._ae.associate(host, port, ae_title=ae_title, max_pdu=MAX_PDU)
                self._association = association
            if not association.is_established:
                return UNABLE_TO_PROCESS
            status = association.send_c_store(dataset)
        return int(status.Status) if status else UNABLE_TO_PROCESS


def main(port: str, to_host: str, to_port: str, to_ae_title: str) -> None:
    """Serve on loopback until killed."""
    _config.LOG_HANDLER_LEVEL = "none"
    ae = AE("RELAY")
    ae.maximum_pdu_size = MAX_PDU
    ae.maximum_associations = 100
    ae.supported_contexts = AllStoragePresentationContexts
    ae.add_supported_context("1.2.840.10008.1.1")  # Verification
    forwarder = Forwarder(to_host, int(to_port), to_ae_title)
    ae.start_server(("127.0.0.1", int(port)), evt_handlers=[(evt.EVT_C_STORE, forwarder.store)])


if __name__ == "__main__":
    main(*sys.argv[1:])
