// Calls of the service's API: buyer sign-in, refusals and retries.

import { browser } from "../shared/storage.js";
import { timeout } from "../shared/timeout.js";

/** Time-out of a call, after which it counts as a network failure. */
const PATIENCE_MS = 15_000;
/** The longest long poll that the service allows. */
const WAIT_SECONDS = 25;

/** A refusal of the service, or a network failure (`network`: the call's outcome is unknown). */
export class Refusal extends Error {
  constructor(code, { status = 0, facts = {}, retryAfter = 0 } = {}) {
    super(code);
    this.code = code;
    this.status = status;
    this.facts = facts;
    this.retryAfter = retryAfter;
    this.requestId = facts.instance ?? "";
  }

  /** Whether the call may have succeeded all the same. */
  get unclear() {
    return this.code === "network" || this.code === "outcome_unknown";
  }
}

async function call(path, { method = "GET", body, headers = {}, patienceMs = PATIENCE_MS } = {}) {
  const request = {
    method,
    headers: { Accept: "application/json", ...headers },
    cache: "no-store",
    signal: timeout(patienceMs),
  };
  if (body !== undefined) {
    request.body = JSON.stringify(body);
    request.headers["Content-Type"] = "application/json";
  }
  let response;
  let answer;
  try {
    response = await fetch(path, request);
    answer = await response.json();
  } catch {
    // No connection, a time-out, or a proxy's page instead of an answer.
    throw new Refusal("network", { status: response?.status });
  }
  if (response.ok) return { answer, headers: response.headers };
  throw new Refusal(answer.code ?? "network", {
    status: response.status,
    facts: answer,
    retryAfter: Number(response.headers.get("Retry-After")) || 0,
  });
}

async function newGuest() {
  try {
    return await call("/v1/guests", { method: "POST" });
  } catch (refusal) {
    // The shop's buyers have accounts: the site that embeds these pages has to sign them in.
    if (refusal.status === 404) throw new Refusal("no_guests", { status: 404 });
    throw refusal;
  }
}

let arriving = null;

/** This browser's token; a new guest's if it has none, or if `refused` was its last one. */
async function buyerToken(refused = null) {
  const known = browser.get("buyer");
  if (known && known !== refused) return known;
  arriving ??= newGuest().finally(() => (arriving = null));
  const { answer } = await arriving;
  // Another tab may have signed in first: both must be the same buyer.
  const other = browser.get("buyer");
  if (other && other !== refused) return other;
  browser.set("buyer", answer.token);
  return answer.token;
}

async function asBuyer(path, options = {}) {
  const send = (token) =>
    call(path, { ...options, headers: { ...options.headers, Authorization: `Bearer ${token}` } });
  const token = await buyerToken();
  try {
    return await send(token);
  } catch (refusal) {
    if (refusal.code !== "unauthenticated") throw refusal;
    return await send(await buyerToken(token));
  }
}

const part = encodeURIComponent;

/** The live and upcoming sales, and the latest past ones: a page may hold a hundred. */
export async function listSales() {
  const sales = [];
  for (let cursor = ""; cursor !== null; ) {
    const { answer } = await call(`/v1/sales${cursor && `?cursor=${part(cursor)}`}`);
    sales.push(...answer.sales);
    const over = answer.sales.at(-1)?.status === "closed";
    cursor = (!over && answer.nextCursor) || null;
  }
  return sales;
}

/**
 * The sale, as this buyer sees it: its admission is issued to the buyer.
 *
 * @param wants.admission signs in a guest if there is no token; without it a token is optional
 */
export async function getSale(saleId, { admission = false } = {}) {
  const token = admission ? await buyerToken() : browser.get("buyer");
  const began = performance.now();
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const { answer } = await call(`/v1/sales/${part(saleId)}`, { headers });
  return { sale: answer, tookMs: performance.now() - began };
}

export async function listReservations(saleId) {
  // A browser without a token has no reservations, and needs none for a visit.
  if (!browser.get("buyer")) return [];
  return (await asBuyer(`/v1/sales/${part(saleId)}/reservations`)).answer.reservations;
}

export async function prepare(saleId, { key, items, amount, admission }) {
  const headers = { "Idempotency-Key": key };
  if (admission) headers["X-Sale-Admission"] = admission;
  const { answer, headers: told } = await asBuyer(`/v1/sales/${part(saleId)}/reservations`, {
    method: "POST",
    headers,
    body: { items, amount },
  });
  return { reservation: answer, replayed: told.get("Idempotent-Replayed") === "true" };
}

/** One reservation: by a token from the URL, or as this browser's buyer; `wait` long-polls. */
export async function getReservation(orderId, { token, wait = false } = {}) {
  const path = `/v1/reservations/${part(orderId)}${wait ? `?wait=${WAIT_SECONDS}` : ""}`;
  const patienceMs = PATIENCE_MS + (wait ? WAIT_SECONDS * 1000 : 0);
  if (token) {
    const headers = { "X-Reservation-Token": token };
    return (await call(path, { headers, patienceMs })).answer;
  }
  if (!browser.get("buyer")) throw new Refusal("unauthenticated", { status: 401 });
  return (await asBuyer(path, { patienceMs })).answer;
}

export async function release(orderId) {
  return (await asBuyer(`/v1/reservations/${part(orderId)}/release`, { method: "POST" })).answer;
}
