"""DICOM lanes: an association ends here, on side A; another begins here, on side B.

`association.py` is the upper layer as a value machine (pynetdicom's state table, PDUs and DIMSE messages,
no sockets); `scp.py` and `scu.py` are its two edges on the event loop; `walk.py` decides what a data set is
before anything believes it; `source.py` and `sink.py` join them to the relay's spool and link.
"""
