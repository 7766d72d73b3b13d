"""Media lanes: a WebRTC or RTP session ends here, on side A; another begins here, on side B.

Side A decodes (`whip.py`, `rtp.py`, `jitter.py`, `codec.py`) and hands on bare pictures and PCM; side B
encodes them anew, once, for everyone who watches (`fanout.py`, `pacer.py`, `whep.py`). Keyframe requests,
congestion control, ICE and DTLS stay on their side.
"""
