"""The pages that the service itself shows: storefront, API docs, and the one that waits."""

from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from litestar import Controller, MediaType, Response, get
from litestar.response import File
from litestar.static_files import (
    create_static_files_router,  # pyright: ignore[reportUnknownVariableType] - its own hooks are
)

__all__ = ["PageController", "please_wait", "static_routers"]

STATIC: Final = Path(__file__).resolve().parent / "static"
#: Everything comes from here; scripts are never inline. `img-src data:` is for one-pixel icons.
_CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _CSP,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin-allow-popups",
    "Cache-Control": "no-cache",
}
#: Swagger UI sets styles of its own on elements, and draws its icons from data addresses.
_DOCS_HEADERS: Final = {
    **_HEADERS,
    "Content-Security-Policy": _CSP.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'"),
}
#: How soon the waiting page loads itself again.
WAIT_SECONDS: Final = 2


def _page(name: str, headers: dict[str, str] = _HEADERS) -> File:
    return File(
        STATIC / name,
        media_type=MediaType.HTML,
        content_disposition_type="inline",
        headers=headers,
    )


class PageController(Controller):
    """HTML pages; what they show they fetch from the API."""

    include_in_schema = False

    @get("/")
    async def sales(self) -> File:
        """The list of sales."""
        return _page("index.html")

    @get("/sales/{sale_id:str}")
    async def sale(self, sale_id: str) -> File:
        """One sale."""
        del sale_id  # The page reads it from its own address.
        return _page("sale.html")

    @get("/result")
    async def result(self) -> File:
        """Where a buyer lands after the payment page."""
        return _page("result.html")

    @get("/docs")
    async def docs(self) -> File:
        """The OpenAPI document, made readable; works offline."""
        return _page("docs.html", _DOCS_HEADERS)


def static_routers() -> list[Any]:
    """Our own static files, and Swagger UI's from its package."""
    swagger = Path(str(files("swagger_ui_bundle")))
    found = next(path.parent for path in swagger.rglob("swagger-ui-bundle.js"))
    return [
        create_static_files_router(
            path="/static", directories=[STATIC], include_in_schema=False, name="static"
        ),
        create_static_files_router(
            path="/docs-assets", directories=[found], include_in_schema=False, name="docs-assets"
        ),
    ]


def please_wait() -> Response[str]:
    """For a browser whose payment could not be begun yet: it loads the same address again."""
    text = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta http-equiv="refresh" content="{WAIT_SECONDS}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>One moment</title><h1>One moment</h1>"
        "<p>Nothing was charged yet. This page tries again by itself.</p>"
        "<p>잠시만 기다려 주세요. 아직 결제되지 않았으며, 자동으로 다시 시도합니다.</p></html>"
    )
    return Response(
        text,
        status_code=503,
        media_type=MediaType.HTML,
        headers={**_HEADERS, "Cache-Control": "no-store", "Retry-After": str(WAIT_SECONDS)},
    )
