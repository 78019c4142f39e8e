// A receiver of webhooks that ships each confirmed order once: `node receiver.mjs PORT FILE`.
//
// The secret is in WEBHOOK_SECRET. FILE has one line per webhook: its id and its effect together, so
// a repeat has no second effect, even if this process is killed in between.

import { createHmac, timingSafeEqual } from "node:crypto";
import { closeSync, existsSync, fsyncSync, openSync, readFileSync, truncateSync, writeSync } from "node:fs";
import { createServer } from "node:http";

const [port, file] = process.argv.slice(2);
const key = Buffer.from(process.env.WEBHOOK_SECRET.replace("whsec_", ""), "base64");
const BODY_BYTES_MAX = 1_000_000;
const TOLERANCE_SECONDS = 300;
const SHIPMENTS = { "order.confirmed": "ship", "order.refunded": "recall" };

// A line without its end was not committed: its webhook was not answered, and is repeated.
const text = existsSync(file) ? readFileSync(file, "utf8") : "";
const whole = text.slice(0, text.lastIndexOf("\n") + 1);
if (whole.length < text.length) truncateSync(file, Buffer.byteLength(whole));
const seen = new Set(whole.split("\n").filter(Boolean).map((line) => JSON.parse(line).id));
const log = openSync(file, "a");

function isValid(headers, body) {
  const { "webhook-id": id, "webhook-timestamp": at, "webhook-signature": signatures } = headers;
  if (!id || !signatures || !(Math.abs(Date.now() / 1000 - Number(at)) <= TOLERANCE_SECONDS)) {
    return false;
  }
  const expected = createHmac("sha256", key).update(`${id}.${at}.`).update(body).digest();
  return signatures.split(" ").some((signature) => {
    const given = Buffer.from(signature.replace(/^v1,/, ""), "base64");
    return signature.startsWith("v1,") && given.length === expected.length && timingSafeEqual(given, expected);
  });
}

function handle(id, webhook) {
  if (seen.has(id)) return;
  const line = { id, state: SHIPMENTS[webhook.type], orderId: webhook.data.reservation?.orderId };
  writeSync(log, `${JSON.stringify(line)}\n`);
  fsyncSync(log);
  seen.add(id);
}

const server = createServer((request, response) => {
  const chunks = [];
  let size = 0;
  request.on("data", (chunk) => {
    size += chunk.length;
    if (size <= BODY_BYTES_MAX) chunks.push(chunk);
  });
  request.on("end", () => {
    const body = Buffer.concat(chunks);
    if (size > BODY_BYTES_MAX) return response.writeHead(413).end();
    if (!isValid(request.headers, body)) return response.writeHead(400).end();
    // After the fsync: an error before it makes the service repeat the webhook.
    handle(request.headers["webhook-id"], JSON.parse(body));
    response.writeHead(204).end();
  });
});
server.listen(Number(port), "127.0.0.1");
process.on("SIGTERM", () => server.close(() => closeSync(log)));
