"""medferry's core: how a record crosses from one network to another, and nothing else does.

A *lane* is one registered one-way exchange. It runs as three processes that one supervisor watches:

    network A ──▶ source ──▶ valve ──▶ sink ──▶ network B

The **source** terminates a protocol on side A (a DICOM association, a WebRTC session) and turns what it
hears into *records*: a decoded frame, a part of a parsed object, a notice (`records.py`). The **sink**
opens a protocol of its own on side B and originates it from records alone. No header, address or name of
the protocol on A is in a record, so none can reach B.

Between them stands the *link*. `wire.py` cuts records into numbered, authenticated fragments; `link.py` is
the seam that sources and sinks see (an Outlet to send on, an Inlet to receive from); `valve.py` is the link
of one machine: a small process that moves fragments from a socket it can only read to a socket it can only
write (and pictures from memory to memory, `trays.py`), so that source and sink share no kernel object.
Nothing is ever acknowledged across it. What A has
accepted is durable in A's `spool.py` before the sender hears "success"; B takes a fragment only once it is
written down; a loss shows on B as a gap, a silence, or a line of the `Manifest` that A repeats.

`supervisor.py` starts, confines (`confine.py`), watches and restarts the three processes; `worker.py` is
what source and sink run in; `config.py` reads the one TOML file; `lanes.py` is the one table that knows
which package serves which kind of lane: `dicom` for studies, `rtc` for live media. Those two import this
package; this package imports neither.

Read in this order: records, wire, link, valve, spool, worker, supervisor.
"""
