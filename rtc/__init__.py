"""Media lanes: a WebRTC or RTP session ends here, on side A; another begins here, on side B.

Side A receives (`whip.py`, `rtp_in.py`, `rtsp.py`, `jitter.py`), decodes (`decode.py`) and hands on bare
pictures and PCM (`publication.py`); side B encodes them anew, once, for everyone who watches (`fanout.py`,
`encode.py`, `rate_control.py`, `x264.py`, `whep.py`, `rtp_out.py`). Keyframe requests, congestion control,
ICE and DTLS stay on their side.
"""
