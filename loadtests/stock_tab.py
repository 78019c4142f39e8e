"""Tab "Stock" in Locust's own web UI, and the board under it."""

# Locust types its own members in part: the values are narrowed where they enter.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable
from typing import Any, Final

import msgspec
from flask import Blueprint, Response, request
from locust.web import WebUI

from loadtests.run import Board, NotBegun, Run
from loadtests.verdict import WEB

__all__ = ["add_stock_tab"]

_COLUMNS: Final = ("sku", "total", "available", "held", "sold", "oversold")
_TYPES: Final = {"board.js": "text/javascript", "board.css": "text/css"}


def add_stock_tab(
    web_ui: WebUI, base_path: str, current: Callable[[], Run | NotBegun | None]
) -> None:
    """Add the tab; the runs come and go behind `current`.

    Locust draws the tab and its table. The chart needs a script of our own, which is added to
    Locust's page and puts the board below the table whenever the table is there.
    """
    app = web_ui.app
    if app is None:
        raise RuntimeError("Locust's web UI has no Flask application to add to")
    web_ui.template_args |= {
        "extended_tabs": [{"title": "Stock", "key": "stock"}],
        "extended_tables": [
            {
                "key": "stock",
                "structure": [{"key": name, "title": name.capitalize()} for name in _COLUMNS],
            }
        ],
    }
    pages = Blueprint("stock", __name__, url_prefix=base_path or None)

    @pages.route("/stock/board.json")
    @web_ui.auth_required_if_enabled
    def board() -> Response:
        run = current()
        return _answer(msgspec.json.encode(run.board() if run else Board()), "application/json")

    @pages.route("/stock/<name>")
    @web_ui.auth_required_if_enabled
    def part(name: str) -> Response:
        if name not in _TYPES:
            return Response(status=404)
        return _answer((WEB / name).read_bytes(), _TYPES[name])

    app.register_blueprint(pages)

    @app.after_request
    def extend(response: Response) -> Response:
        path = request.path.removeprefix(base_path)
        if response.status_code == 200 and path in {"", "/"}:
            _add_script(response)
        elif response.status_code == 200 and path == "/stats/requests":
            _add_rows(response, current())
        return response


def _answer(body: bytes, content_type: str) -> Response:
    return Response(body, content_type=content_type, headers={"Cache-Control": "no-store"})


def _add_script(response: Response) -> None:
    page = response.get_data(as_text=True)
    added = (
        '<link rel="stylesheet" href="./stock/board.css">'
        '<script src="./stock/board.js" defer></script></body>'
    )
    response.set_data(page.replace("</body>", added))


def _add_rows(response: Response, run: Run | NotBegun | None) -> None:
    report: dict[str, Any] = msgspec.json.decode(response.get_data())
    rows = [
        {
            "sku": sample.sku,
            "total": sample.total,
            "available": sample.available,
            "held": sample.held,
            "sold": sample.sold,
            "oversold": max(0, sample.sold - sample.total),
            # Locust's own key of a row.
            "name": sample.sku,
        }
        for sample in (run.latest() if run else ())
    ]
    report["extended_stats"] = [{"key": "stock", "data": rows}]
    response.set_data(msgspec.json.encode(report))
