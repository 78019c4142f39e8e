"""A receiver of webhooks that ships each confirmed order once: `receiver.py PORT DATABASE`.

The secret is in WEBHOOK_SECRET. The id of a webhook and its effect are written in one transaction,
so a repeat has no second effect, even if this process is killed in between.
"""

import os
import sqlite3
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

from reservation.client import InvalidWebhook, verify_webhook

#: No webhook is larger.
BODY_BYTES_MAX = 1_000_000
TABLES = """
    CREATE TABLE IF NOT EXISTS webhooks (id TEXT PRIMARY KEY);
    CREATE TABLE IF NOT EXISTS shipments (order_id TEXT, state TEXT);
"""
#: The effect of a webhook in this shop.
SHIPMENTS = {"order.confirmed": "ship", "order.refunded": "recall"}


class Receiver(BaseHTTPRequestHandler):
    """Handles one webhook per request."""

    database: sqlite3.Connection
    secret: str

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", "0"))
        if length > BODY_BYTES_MAX:
            self.send_error(413)
            return
        try:
            webhook = verify_webhook(self.secret, dict(self.headers), self.rfile.read(length))
        except InvalidWebhook as error:
            self.send_error(400, str(error))
            return
        with self.database:  # One transaction.
            new = self.database.execute(
                "INSERT OR IGNORE INTO webhooks VALUES (?)", [self.headers["webhook-id"]]
            )
            state = SHIPMENTS.get(webhook["type"])
            if new.rowcount and state:
                order_id = webhook["data"]["reservation"]["orderId"]
                self.database.execute("INSERT INTO shipments VALUES (?, ?)", [order_id, state])
        # After the commit: an error before it makes the service repeat the webhook.
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Log nothing."""


def main(port: int, path: str) -> None:
    Receiver.secret = os.environ["WEBHOOK_SECRET"]
    Receiver.database = sqlite3.connect(path)
    Receiver.database.executescript(TABLES)
    HTTPServer(("127.0.0.1", port), Receiver).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
