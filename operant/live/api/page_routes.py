"""The page in the browser: files that `make page` builds from web/, and that use nothing but the public API."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse, Response

from operant.live.api.service import ApiError

__all__ = ["routes"]

routes = APIRouter()

STATIC = Path(__file__).resolve().parents[1] / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
NOT_BUILT = (
    "<!doctype html><title>operant</title><p>The API is here, the page is not built: run <code>make page</code> in the "
    "checkout, which needs npm, and start the server again.</p>"
)


@routes.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> Response:
    """The page, or, where it is not built, how to build it."""
    if not (STATIC / "index.html").exists():
        return HTMLResponse(NOT_BUILT, 503)
    return _file(STATIC / "index.html")


@routes.get("/icon.svg", include_in_schema=False)
async def icon() -> Response:
    """The icon of the page."""
    return _file(STATIC / "icon.svg")


@routes.get("/assets/{name}", include_in_schema=False)
async def asset(name: str) -> Response:
    """A built file. Its name holds a hash of what it says, so that it may be kept for ever."""
    return _file(STATIC / "assets" / name, **{"Cache-Control": "public, max-age=31536000, immutable"})


def _file(path: Path, **headers: str) -> Response:
    # only what the build wrote, whatever a name with dots or separators points to
    if path.suffix not in TYPES or path.resolve().parent not in (STATIC, STATIC / "assets") or not path.is_file():
        raise ApiError(404, f"there is no file {path.name[:100]!r}", code="not_found")
    return FileResponse(path, media_type=TYPES[path.suffix], headers={"Content-Security-Policy": POLICY, **headers})
