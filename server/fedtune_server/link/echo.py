"""The link-speed probe: sends bytes back, or takes them, for a site that shows its token."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

PATH = "/fedtune/v1/echo"
MOST_BYTES = 4 << 20


async def echo(request: Request) -> Response:
    """GET `?bytes=N` answers N bytes; POST answers how many came."""
    if request.method == "POST":
        return PlainTextResponse(str(len(await request.body())))
    text = request.query_params.get("bytes", "0")
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) > MOST_BYTES:
        return PlainTextResponse(f"bytes: expected 0 to {MOST_BYTES}", status_code=400)
    return Response(bytes(int(text)), media_type="application/octet-stream")


def echo_route() -> Route:
    """The route of the probe; the guard lets only callers with a token come here."""
    return Route(PATH, echo, methods=["GET", "POST"])
