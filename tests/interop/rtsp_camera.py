"""Cameras: GStreamer's RTSP server, run by the system's Python, which has its bindings.

    python3 rtsp_camera.py CLIP WIDTHxHEIGHT RATE PORT[:basic|:digest] ...

serves a clip of bare yuv420p pictures, in a loop, at each port under the paths of `MOUNTS`, and says "ready"
once it listens. A port with a scheme lets only `USER` in. Nothing of the project is imported: the system's
Python does not have what that needs.
"""

from __future__ import annotations

import sys
from typing import Any

USER, PASSWORD = "viewer", "pass word/42"
"""The password has characters that a URL must escape."""

TONE_HERTZ = 1000

H264 = (
    "x264enc tune=zerolatency speed-preset=ultrafast bitrate=1500 key-int-max=30 ! rtph264pay name=pay0 pt=96"
)

TONE = f"audiotestsrc wave=sine freq={TONE_HERTZ} volume=0.5 ! audio/x-raw"

PCMU = f"{TONE},rate=8000,channels=1 ! mulawenc ! rtppcmupay"
"""Packets of 128 ms, as audiotestsrc makes them."""

MOUNTS = {
    "live": f"CLIP ! {H264}",
    "aac": f"CLIP ! {H264} {TONE},rate=44100,channels=2 ! avenc_aac ! rtpmp4gpay name=pay1 pt=97",
    "pcmu": f"CLIP ! {H264} {PCMU} name=pay1 pt=0",
    "sound": f"{PCMU} name=pay0 pt=0",
    "jpeg": "CLIP ! jpegenc ! rtpjpegpay name=pay0 pt=26",
}


def main(clip: str, size: str, rate: str, *ports: str) -> None:
    """Serve until killed."""
    # Here, since tests import the module for its names, in an environment without the bindings.
    import gi

    for namespace in ("Gst", "GstRtsp", "GstRtspServer"):
        gi.require_version(namespace, "1.0")
    from gi.repository import GLib, Gst, GstRtsp, GstRtspServer

    Gst.init(None)
    width, _, height = size.partition("x")
    source = (
        f"multifilesrc location={clip} loop=true ! "
        f"rawvideoparse width={width} height={height} format=i420 framerate={rate}/1"
    )

    def auth(scheme: str) -> Any:
        found = GstRtspServer.RTSPAuth.new()
        token = GstRtspServer.RTSPToken.new()
        token.set_string("media.factory.role", USER)
        if scheme == "digest":
            found.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
            found.add_digest(USER, PASSWORD, token)
        else:
            found.add_basic(GstRtspServer.RTSPAuth.make_basic(USER, PASSWORD), token)
        return found

    for item in ports:
        port, _, scheme = item.partition(":")
        server = GstRtspServer.RTSPServer.new()
        server.set_address("127.0.0.1")
        server.set_service(port)
        if scheme:
            server.set_auth(auth(scheme))
        for path, pipeline in MOUNTS.items():
            factory = GstRtspServer.RTSPMediaFactory.new()
            factory.set_launch(f"( {pipeline.replace('CLIP', source)} )")
            factory.set_shared(True)
            if scheme:
                permissions = GstRtspServer.RTSPPermissions.new()
                for what in ("media.factory.access", "media.factory.construct"):
                    permissions.add_permission_for_role(USER, what, True)
                factory.set_permissions(permissions)
            server.get_mount_points().add_factory(f"/{path}", factory)
        if not server.attach(None):
            sys.exit(f"port {port} is taken")
    print("ready", flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main(*sys.argv[1:])
