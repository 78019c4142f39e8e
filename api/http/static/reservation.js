// Client of the service for a shop's own pages; see docs/reference/client.md.

const PAUSE_MS = 200;
const PAUSE_MAX_MS = 3_000;
const PATIENCE_MS = 15_000;
const PASSING = ["network", "unavailable", "outcome_unknown", "rate_limited"];

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const part = encodeURIComponent;
// No randomUUID on plain http.
const newKey = () => crypto.randomUUID?.() ?? crypto.getRandomValues(new Uint32Array(4)).join("-");

// No AbortSignal.timeout before Safari 16 and Chrome 103.
const timeout = (ms) => {
  if (AbortSignal.timeout) return AbortSignal.timeout(ms);
  const controller = new AbortController();
  setTimeout(() => controller.abort(), ms);
  return controller.signal;
};

/** A refusal of the service, or "network". */
export class Refusal extends Error {
  constructor(code, status = 0, facts = {}) {
    super(facts.detail ?? code);
    Object.assign(this, { code, status, facts });
  }
}

/** Calls to the service at `url`. `token` is the buyer's bearer token, or a function for it. */
export function connect({ url = "", token = null, attempts = 5 } = {}) {
  // The server's clock minus this device's.
  let offset = 0;
  const now = () => Date.now() + offset;

  async function once(method, path, { headers = {}, body, own = true, patience = 0 } = {}) {
    const bearer = own && (typeof token === "function" ? await token() : token);
    let response;
    let answer;
    try {
      response = await fetch(`${url}/v1/${path}`, {
        method,
        body: body && JSON.stringify(body),
        cache: "no-store",
        signal: timeout(PATIENCE_MS + patience),
        headers: {
          Accept: "application/json",
          ...(body && { "Content-Type": "application/json" }),
          ...(bearer && { Authorization: `Bearer ${bearer}` }),
          ...headers,
        },
      });
      answer = await response.json();
    } catch {
      throw new Refusal("network", response?.status);
    }
    if (response.ok) return answer;
    throw new Refusal(answer.code ?? "network", response.status, answer);
  }

  async function call(...wish) {
    for (let made = 1; ; made += 1) {
      try {
        return await once(...wish);
      } catch (refusal) {
        if (made >= attempts || !PASSING.includes(refusal.code)) throw refusal;
        const asked = (refusal.facts.retryAfter ?? 0) * 1000;
        if (asked > PATIENCE_MS) throw refusal;
        await sleep(asked + Math.random() * Math.min(PAUSE_MAX_MS, PAUSE_MS * 2 ** made));
      }
    }
  }

  const proof = (proven) =>
    proven ? { headers: { "X-Reservation-Token": proven }, own: false } : {};

  return {
    async guest() {
      const guest = await call("POST", "guests", { own: false });
      token = guest.token;
      return guest;
    },
    async sale(saleId) {
      const sale = await call("GET", `sales/${part(saleId)}`);
      offset = Date.parse(sale.serverTime) - Date.now();
      return sale;
    },
    /** The same `key` and body return the same order. */
    prepare(saleId, { items, amount, orderName, admission, key = newKey() }) {
      const headers = { "Idempotency-Key": key };
      if (admission) headers["X-Sale-Admission"] = admission;
      const body = { items, amount, orderName };
      return call("POST", `sales/${part(saleId)}/reservations`, { headers, body });
    },
    /** At its next change, or after `wait` seconds. */
    reservation(orderId, { token: proven, wait = 0 } = {}) {
      const path = `reservations/${part(orderId)}${wait ? `?wait=${wait}` : ""}`;
      return call("GET", path, { ...proof(proven), patience: wait * 1000 });
    },
    release({ orderId, token: proven }) {
      return call("POST", `reservations/${part(orderId)}/release`, proof(proven));
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
      const listen = () => {
        clearTimeout(timer);
        source?.close();
        if (document.hidden) return;
        source = new EventSource(`${url}/v1/sales/${part(saleId)}/events`);
        source.addEventListener("stock", ({ data }) => changed(JSON.parse(data)));
        // After a refusal the browser does not reconnect by itself.
        source.onerror = ({ target }) => {
          if (target.readyState === 2) timer = setTimeout(listen, PAUSE_MAX_MS * (1 + Math.random()));
        };
      };
      document.addEventListener("visibilitychange", listen);
      listen();
      return () => {
        document.removeEventListener("visibilitychange", listen);
        clearTimeout(timer);
        source?.close();
      };
    },
  };
}
