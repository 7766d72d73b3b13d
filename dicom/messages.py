"""DIMSE messages out of fragments (PS3.7 §6.3, PS3.8 Annex E): a command, then its data set if it has one.

    Fragments ─▶ receive() ─▶ None (more of the command is to come)
                          └─▶ Command            once, when it is whole
                          └─▶ Fragments          of its data set, each as it came, the last one with `last`

Only the command is kept, within `dimse.MAX_COMMAND_BYTES`.

Never here: I/O, what a command asks for.
"""

from __future__ import annotations

from dicom import dimse
from dicom.dimse import Command, CommandError
from dicom.pdu import AbortReason, Fragments
from relay.errors import PeerError


class MessageError(PeerError):
    """Fragments that make no message. `source` and `code` are for the A-ABORT (PS3.8 §9.3.8)."""

    def __init__(self, detail: str, source: int, code: AbortReason) -> None:
        super().__init__("message", detail)
        self.source = source
        self.code = code


class MessageReader:
    """Reads the messages of one association, one after the other."""

    def __init__(self) -> None:
        self.context_id = 0
        """The presentation context of the message that is being read, or was read last."""
        self.in_data_set = False
        self._command = bytearray()

    def __repr__(self) -> str:
        where = "data set" if self.in_data_set else f"command, {len(self._command)} bytes"
        return f"<MessageReader in {where}>"

    @property
    def between_messages(self) -> bool:
        """Whether nothing of a message has been read that is not whole."""
        return not (self.in_data_set or self._command)

    def receive(self, fragments: Fragments) -> Command | Fragments | None:
        """Take what `Association.next_event` gave.

        Raises:
            MessageError: Not a message; the association is to be aborted.
        """
        if fragments.is_command:
            return self._receive_command(fragments)
        if not self.in_data_set:
            raise _misplaced("a data set without a command")
        if fragments.context_id != self.context_id:
            raise _misplaced("a data set in another presentation context than its command")
        if fragments.last:
            self.in_data_set = False
        return fragments

    def _receive_command(self, fragments: Fragments) -> Command | None:
        if self.in_data_set:
            raise _misplaced("a command before the data set was whole")
        if not self._command:
            self.context_id = fragments.context_id
        elif fragments.context_id != self.context_id:
            raise _misplaced("a command in two presentation contexts")
        for part in fragments.parts:
            if len(self._command) + len(part) > dimse.MAX_COMMAND_BYTES:
                detail = f"a command set of more than {dimse.MAX_COMMAND_BYTES} bytes"
                raise MessageError(detail, 2, AbortReason.INVALID_PARAMETER)
            self._command += part
        if not fragments.last:
            return None
        try:
            command = dimse.parse(bytes(self._command))
        except CommandError as error:
            # The upper layer did its part; it is the message's own service that gives up.
            raise MessageError(str(error), 0, AbortReason.NOT_SPECIFIED) from None
        self._command.clear()
        self.in_data_set = command.has_data_set
        return command


def _misplaced(detail: str) -> MessageError:
    return MessageError(detail, 2, AbortReason.UNEXPECTED_PARAMETER)
