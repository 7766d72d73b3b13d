"""WHEP over HTTPS: a viewer that trusts the ward's own authority sees pictures, and no other does."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import aiohttp
import pytest
import trustme
from aiortc import RTCSessionDescription

from tests.rtc.test_whep import BEARER, SDP, TOKEN, Watcher, room


async def test_whep_over_https(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    keys = {"tls_certificate": str(certificate), "tls_key": str(key), "tokens": {"*": TOKEN}}
    async with room(tmp_path, **keys) as place, aiohttp.ClientSession() as http:
        secure = place.url.replace("http:", "https:")
        watcher = Watcher()
        offer = await watcher.offer("video")
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await http.post(f"{secure}/whep/room", data=offer, headers=SDP | BEARER)
        with pytest.raises(aiohttp.ClientError):
            await http.post(f"{place.url}/whep/room", data=offer, headers=SDP | BEARER)
        async with http.post(
            f"{secure}/whep/room", data=offer, headers=SDP | BEARER, ssl=trusting
        ) as response:
            assert response.status == 201
            location, answer = response.headers["Location"], await response.text()
        await watcher.connection.setRemoteDescription(RTCSessionDescription(sdp=answer, type="answer"))
        assert len(await asyncio.wait_for(watcher.numbers(5), 5)) == 5
        async with http.delete(secure + location, headers=BEARER, ssl=trusting) as response:
            assert response.status == 200
        await watcher.connection.close()
