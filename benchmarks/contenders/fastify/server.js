// The sale in Node: fastify, ioredis, one EVALSHA for each request.
import { createHash, createHmac } from "node:crypto";
import { readFileSync } from "node:fs";
import Fastify from "fastify";
import Redis from "ioredis";

const { BENCH_PORT, BENCH_SOCKET, BENCH_EPOCH, BENCH_SCRIPT } = process.env;
const SALE = "bench";
const TAG = `rsv:{${SALE}}:`;
const NOT_AFTER_MS = 2000;
const INTERVAL_MS = 50;
const BURST = 20;
const SECRET = "order ids of the benchmark";

const redis = new Redis({ path: BENCH_SOCKET });
const sha = await redis.script("LOAD", readFileSync(BENCH_SCRIPT, "utf8"));
const app = Fastify({ logger: false });

const wish = {
  type: "object",
  additionalProperties: false,
  required: ["items", "amount"],
  properties: {
    amount: { type: "integer", minimum: 1 },
    orderName: { type: "string", minLength: 1, maxLength: 100 },
    items: {
      type: "array",
      minItems: 1,
      maxItems: 20,
      items: {
        type: "object",
        additionalProperties: false,
        required: ["sku", "quantity"],
        properties: {
          sku: { type: "string", pattern: "^[A-Za-z0-9_.-]{1,64}$" },
          quantity: { type: "integer", minimum: 1, maximum: 10000 },
        },
      },
    },
  },
};

const held = {
  type: "object",
  properties: {
    orderId: { type: "string" },
    saleId: { type: "string" },
    status: { type: "string" },
    amount: { type: "integer" },
    createdAt: { type: "integer" },
    expiresAt: { type: "integer" },
    items: {
      type: "array",
      items: {
        type: "object",
        properties: {
          sku: { type: "string" },
          quantity: { type: "integer" },
          price: { type: "integer" },
        },
      },
    },
  },
};

async function prepare(request, reply) {
  const { items, amount } = request.body;
  const buyer = request.headers["x-buyer"];
  const key = request.headers["idempotency-key"];
  const tail = createHmac("sha256", SECRET).update(`${buyer}:${key}`).digest();
  const orderId = `${SALE}-${tail.subarray(0, 18).toString("base64url")}`;
  const digest = createHash("sha256").update(JSON.stringify(request.body)).digest("base64url").slice(0, 12);
  const { sku, quantity } = items[0];
  const now = Date.now();
  const replies = await redis.evalsha(
    sha,
    10,
    `${TAG}sale`,
    `${TAG}deadlines`,
    `${TAG}outbox`,
    `${TAG}confirming`,
    `${TAG}deposits`,
    `${TAG}stock:${sku}`,
    `${TAG}order:${orderId}`,
    `${TAG}buyer:${buyer}`,
    `${TAG}buyer-orders:${buyer}`,
    `${TAG}rate:${buyer}`,
    now + NOT_AFTER_MS,
    BENCH_EPOCH,
    0,
    "",
    now,
    INTERVAL_MS,
    BURST,
    0,
    0,
    0,
    1,
    1,
    1,
    "1",
    1,
    "",
    sku,
    digest,
    "Hoodie",
    '"Hoodie"',
    amount,
    0,
    `1 ${quantity}`,
  );
  const [[word, expiresAt, createdAt, , lines], seq] = replies;
  if (typeof seq !== "number") return reply.code(409).send({ code: seq ? seq[0] : word });
  reply.code(201);
  return {
    orderId,
    saleId: SALE,
    status: "HELD",
    amount,
    createdAt: Number(createdAt),
    expiresAt: Number(expiresAt),
    items: JSON.parse(lines).map(([name, count, price]) => ({ sku: name, quantity: count, price })),
  };
}

app.post(`/v1/sales/${SALE}/reservations`, { schema: { body: wish, response: { 201: held } } }, prepare);
process.on("SIGTERM", () => {
  app.close().then(() => process.exit(0));
});
await app.listen({ host: "127.0.0.1", port: Number(BENCH_PORT) });
