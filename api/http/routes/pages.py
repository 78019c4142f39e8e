"""The HTML pages of the service: storefront, console, API docs, and the page that reloads."""

from collections.abc import Sequence
from functools import lru_cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from litestar import Controller, MediaType, Request, Response, get
from litestar.connection import ASGIConnection
from litestar.datastructures import CacheControlHeader
from litestar.exceptions import NotFoundException
from litestar.handlers.base import BaseRouteHandler
from litestar.params import FromPath
from litestar.response import File
from litestar.static_files import (
    create_static_files_router,  # pyright: ignore[reportUnknownVariableType] - its own hooks are
)
from litestar.utils import normalize_path

from api.http.dependencies import api_of

__all__ = [
    "PLEASE_WAIT",
    "PLEASE_WAIT_HEADERS",
    "SDK_HEADERS",
    "PageController",
    "please_wait",
    "requires_document",
    "static_routers",
]

STATIC: Final = Path(__file__).resolve().parents[1] / "static"
#: Everything comes from this origin; scripts are never inline. `img-src data:` is for icons.
_CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _CSP,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin-allow-popups",
    "Cache-Control": "no-cache",
}
#: Swagger UI sets inline styles on elements, and draws its icons from data URLs.
_DOCS_HEADERS: Final = {
    **_HEADERS,
    "Content-Security-Policy": _CSP.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'"),
}
#: The sale's page where the PG's own script opens the payment: its frames, images and styles come
#: from the PG, and nothing from any other origin runs.
SDK_HEADERS: Final = {
    **_HEADERS,
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self' https://js.tosspayments.com; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: https:; "
        "connect-src 'self' https://*.tosspayments.com; frame-src https://*.tosspayments.com; "
        "form-action 'self' https://*.tosspayments.com; base-uri 'none'; frame-ancestors 'none'"
    ),
}
_IMAGES: Final = "img-src 'self'"
#: The name of a storefront without a shop's name; the page's script translates it.
_BRAND: Final = '<span data-t="brand">Flash sale</span>'
#: Our scripts import each other by unversioned names: after an upgrade none may be stale.
_REVALIDATE: Final = CacheControlHeader(no_cache=True)
#: Swagger UI is large and changes only with its package.
_CACHE_ONE_HOUR: Final = CacheControlHeader(max_age=3_600)
#: Reload interval of the waiting page.
WAIT_SECONDS: Final = 2


def _with_pictures(headers: dict[str, str], origins: Sequence[str]) -> dict[str, str]:
    """The headers of a page that shows pictures of items from these origins."""
    policy = headers["Content-Security-Policy"]
    return {
        **headers,
        "Content-Security-Policy": policy.replace(_IMAGES, " ".join([_IMAGES, *origins])),
    }


@lru_cache(maxsize=8)
def _storefront_page(name: str, shop_name: str, shop_url: str, shop_footer: str) -> str:
    """A page of the storefront with the shop's name and footer."""
    page = (STATIC / name).read_text(encoding="utf-8")
    if shop_name:
        page = page.replace(_BRAND, f"<span>{escape(shop_name)}</span>", 1)
    lines = [escape(line) for line in shop_footer.replace("\\n", "\n").splitlines()]
    if shop_url:
        link = f'<a href="{escape(shop_url)}">{escape(shop_name or shop_url)}</a>'
        lines.insert(0, link)
    if lines:
        footer = f'<footer class="shop quiet small">{"<br>".join(lines)}</footer>'
        page = page.replace("</body>", f"{footer}\n</body>", 1)
    return page


def _shop_page(
    request: Request[Any, Any, Any], name: str, headers: dict[str, str] = _HEADERS
) -> Response[str]:
    settings = api_of(request).service.settings
    page = _storefront_page(name, settings.shop_name, settings.shop_url, settings.shop_footer)
    return Response(
        page, media_type=MediaType.HTML, headers=_with_pictures(headers, settings.image_origins)
    )


def _page(name: str, headers: dict[str, str] = _HEADERS) -> File:
    return File(
        STATIC / name,
        media_type=MediaType.HTML,
        content_disposition_type="inline",
        headers=headers,
    )


class PageController(Controller):
    """HTML pages; they fetch their data from the API."""

    include_in_schema = False

    @get("/")
    async def sales(self, request: Request[Any, Any, Any]) -> Response[str]:
        """The list of sales."""
        return _shop_page(request, "storefront/index.html")

    @get("/sales/{sale_id:str}")
    async def sale(self, request: Request[Any, Any, Any], sale_id: FromPath[str]) -> Response[str]:
        """One sale."""
        del sale_id  # The page reads it from its own URL.
        by_address = bool(api_of(request).service.settings.toss_checkout_url)
        headers = _HEADERS if by_address else SDK_HEADERS
        return _shop_page(request, "storefront/sale.html", headers)

    @get("/result")
    async def result(self, request: Request[Any, Any, Any]) -> Response[str]:
        """The result page after the payment page."""
        return _shop_page(request, "storefront/result.html")

    @get("/ops")
    async def ops(self) -> File:
        """The operator's console; the page prompts for the admin key."""
        return _page("console/console.html")

    @get("/docs")
    async def docs(self) -> File:
        """The OpenAPI document in Swagger UI; works offline."""
        return _page("docs/docs.html", _DOCS_HEADERS)


def requires_static_file(
    connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler
) -> None:
    """Guard: no path with a zero byte, on which the file system raises, and no page.

    Pages have their own routes, with the headers that prevent framing by other sites.
    """
    path = connection.scope["path"]
    if "\0" in path or path.lower().rstrip("/").endswith(".html"):
        raise NotFoundException


def requires_document(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """Guard: below /schema only the document; the framework has a page for all other paths."""
    if normalize_path(connection.scope["path"]) not in ("/schema", "/schema/openapi.json"):
        raise NotFoundException


def static_routers() -> list[Any]:
    """Routers for our own static files, and for Swagger UI's from its package."""
    swagger = Path(str(files("swagger_ui_bundle")))
    found = next(path.parent for path in swagger.rglob("swagger-ui-bundle.js"))
    return [
        create_static_files_router(
            path="/static",
            directories=[STATIC],
            include_in_schema=False,
            name="static",
            cache_control=_REVALIDATE,
            guards=[requires_static_file],
        ),
        create_static_files_router(
            path="/docs-assets",
            directories=[found],
            include_in_schema=False,
            name="docs-assets",
            cache_control=_CACHE_ONE_HOUR,
            guards=[requires_static_file],
        ),
    ]


#: For a browser while the state of its payment is unknown: it reloads itself. The page does not
#: mention the money, which may be taken already when the page is reloaded.
PLEASE_WAIT: Final = (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    f'<meta http-equiv="refresh" content="{WAIT_SECONDS}">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    "<title>One moment</title><h1>One moment</h1>"
    "<p>Your payment is being processed. This page reloads by itself, and you will not be "
    "charged twice.</p>"
    "<p>잠시만 기다려 주세요. 결제를 확인하고 있습니다. 자동으로 다시 시도하며 "
    "이중으로 결제되지 않습니다.</p></html>"
).encode()
PLEASE_WAIT_HEADERS: Final = {
    **_HEADERS,
    "Cache-Control": "no-store",
    "Retry-After": str(WAIT_SECONDS),
}


def please_wait() -> Response[bytes]:
    """The page that reloads itself."""
    return Response(
        PLEASE_WAIT, status_code=503, media_type=MediaType.HTML, headers=PLEASE_WAIT_HEADERS
    )
