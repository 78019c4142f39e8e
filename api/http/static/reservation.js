// Client of the service for a shop's own pages; see docs/reference/client.md.

const TIMEOUT_MS = 15_000;
const PAUSE_MS = 200;
const PAUSE_MAX_MS = 20_000;
const STREAM_RETRY_MS = 3_000;
const UNKNOWN = ["network", "outcome_unknown"];
const TEMPORARY = [...UNKNOWN, "unavailable", "rate_limited"];

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const part = encodeURIComponent;

/** An idempotency key; plain http has no randomUUID. */
export const newKey = () => crypto.randomUUID?.() ?? crypto.getRandomValues(new Uint32Array(4)).join("-");

/** A refusal of the service, or "network"; `unclear`: the call may have taken effect. */
export class Refusal extends Error {
  constructor(code, status = 0, facts = {}) {
    super(facts.detail ?? code);
    Object.assign(this, { code, status, facts, unclear: UNKNOWN.includes(code) });
  }
}

/**
 * The response of one request; throws a Refusal, or the AbortError of `signal`. `onHeaders`: called
 * with the headers of a response that is no refusal.
 */
export async function request(
  address,
  { body, headers, read = "json", timeoutMs = TIMEOUT_MS, signal, onHeaders, ...init } = {},
) {
  // No AbortSignal.timeout before Safari 16 and Chrome 103.
  const controller = new AbortController();
  const abort = () => controller.abort();
  const timer = setTimeout(abort, timeoutMs);
  signal?.addEventListener("abort", abort);
  let response;
  let answer;
  try {
    if (signal?.aborted) abort();
    response = await fetch(address, {
      ...init,
      body: body && JSON.stringify(body),
      cache: "no-store",
      signal: controller.signal,
      headers: { Accept: "application/json", ...(body && { "Content-Type": "application/json" }), ...headers },
    });
    answer = await response[response.ok ? read : "json"]();
  } catch (error) {
    throw signal?.aborted ? error : new Refusal("network", response?.status);
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", abort);
  }
  if (response.ok) {
    onHeaders?.(response.headers);
    return answer;
  }
  throw new Refusal(answer.code ?? "network", response.status, answer);
}

/** Calls to the service at `url`. `token` is the buyer's bearer token, or a function for it. */
export function connect({ url = "", token = null, attempts = 5 } = {}) {
  // The server's clock minus this device's.
  let offset = 0;
  const now = () => Date.now() + offset;

  function readClock({ serverTime, updatedAt }, sentAt) {
    const arrivedAt = Date.now();
    if (serverTime) offset = Date.parse(serverTime) - (sentAt + arrivedAt) / 2;
    else if (updatedAt) offset = Math.max(offset, Date.parse(updatedAt) - arrivedAt);
  }

  async function send(path, bearer, { headers, ...options }) {
    const sentAt = Date.now();
    const authorization = bearer && { Authorization: `Bearer ${bearer}` };
    const answer = await request(`${url}/v1/${path}`, { ...options, headers: { ...authorization, ...headers } });
    readClock(answer, sentAt);
    return answer;
  }

  async function once(path, { own = true, ...options }) {
    const bearer = own && (typeof token === "function" ? await token() : token);
    try {
      return await send(path, bearer, options);
    } catch (refusal) {
      if (refusal.code !== "unauthenticated" || !bearer || typeof token !== "function") throw refusal;
      const renewed = await token(bearer);
      if (renewed === bearer) throw refusal;
      return send(path, renewed, options);
    }
  }

  async function call(method, path, { attempts: most = attempts, onRetry, ...options } = {}) {
    let lost;
    for (let made = 1; ; made += 1) {
      try {
        return await once(path, { method, ...options });
      } catch (refusal) {
        if (!(refusal instanceof Refusal)) throw refusal;
        const isRead = method === "GET";
        if (refusal.unclear && !isRead) lost = refusal;
        refusal.unclear = Boolean(lost);
        if (!TEMPORARY.includes(refusal.code) && !(isRead && refusal.status >= 500)) throw refusal;
        const retryMs = (refusal.facts.retryAfter ?? 0) * 1000;
        // "unavailable" is certain of its own attempt only.
        if (made >= most || retryMs > TIMEOUT_MS) throw lost ?? refusal;
        onRetry?.(refusal);
        await sleep(retryMs + Math.random() * Math.min(PAUSE_MAX_MS, PAUSE_MS * 2 ** made));
      }
    }
  }

  const proof = (proven) =>
    proven ? { headers: { "X-Reservation-Token": proven }, own: false } : {};

  return {
    /** The server's time in ms, estimated from the responses so far. */
    now,
    async guest() {
      const guest = await call("POST", "guests", { own: false });
      token = guest.token;
      return guest;
    },
    /** Every sale, page by page: live ones first, then upcoming, then past. */
    async *sales(options) {
      for (let cursor = ""; cursor !== null; ) {
        const page = await call("GET", `sales${cursor && `?cursor=${part(cursor)}`}`, { ...options, own: false });
        yield* page.sales;
        cursor = page.nextCursor ?? null;
      }
    },
    sale(saleId, options) {
      return call("GET", `sales/${part(saleId)}`, options);
    },
    /** The same `key` and body return the same order. */
    prepare(saleId, { items, amount, orderName, admission, key = newKey(), ...options }) {
      const headers = { "Idempotency-Key": key };
      if (admission) headers["X-Sale-Admission"] = admission;
      const body = { items, amount, orderName };
      return call("POST", `sales/${part(saleId)}/reservations`, { ...options, headers, body });
    },
    /** The buyer's own in a sale, newest first. */
    async reservations(saleId, options) {
      return (await call("GET", `sales/${part(saleId)}/reservations`, options)).reservations;
    },
    /** At its next change, or after `wait` seconds. */
    reservation(orderId, { token: proven, wait = 0, ...options } = {}) {
      const path = `reservations/${part(orderId)}${wait ? `?wait=${wait}` : ""}`;
      return call("GET", path, { ...options, ...proof(proven), timeoutMs: TIMEOUT_MS + wait * 1000 });
    },
    /** Completes even if the page is left meanwhile. */
    release({ orderId, token: proven }, options) {
      return call("POST", `reservations/${part(orderId)}/release`, { ...options, ...proof(proven), keepalive: true });
    },
    /** For `pagehide`, when the buyer leaves for good. */
    leave({ orderId, token: proven }) {
      return navigator.sendBeacon(`${url}/v1/reservations/${part(orderId)}/release`, proven);
    },
    /** Calls `tick` with the ms left, each second and at the end; returns its stop function. */
    countdown({ expiresAt }, tick) {
      let timer;
      const step = () => {
        const left = Math.max(0, Date.parse(expiresAt) - now());
        tick(left);
        if (left) timer = setTimeout(step, left % 1000 || 1000);
      };
      step();
      return () => clearTimeout(timer);
    },
    /** Calls `changed` with {sku, available, held, sold}; a hidden page closes its stream. */
    stock(saleId, changed) {
      let source;
      let timer;
      const close = () => {
        clearTimeout(timer);
        source?.close();
        source = null;
      };
      const follow = ({ type } = {}) => {
        if (document.hidden || type === "pagehide") return close();
        if (source) return;
        source = new EventSource(`${url}/v1/sales/${part(saleId)}/events`);
        source.addEventListener("stock", ({ data }) => changed(JSON.parse(data)));
        // After a refusal the browser does not reconnect by itself.
        source.onerror = ({ target }) => {
          if (target !== source || target.readyState !== EventSource.CLOSED) return;
          close();
          timer = setTimeout(follow, STREAM_RETRY_MS * (1 + Math.random()));
        };
      };
      const events = [[document, "visibilitychange"], [window, "pagehide"], [window, "pageshow"]];
      for (const [target, type] of events) target.addEventListener(type, follow);
      follow();
      return () => {
        for (const [target, type] of events) target.removeEventListener(type, follow);
        close();
      };
    },
  };
}
