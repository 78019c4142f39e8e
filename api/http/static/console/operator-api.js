// Calls of the operator's API, with the key and the name stored in this tab.

import { timeout } from "../shared/timeout.js";

/** Time-out of a call. */
const PATIENCE_MS = 60_000;
/** An audit reads every order of the sale: half a minute for seventy thousand of them. */
const AUDIT_PATIENCE_MS = 1_800_000;
const KEPT = "reservation.operator";

export class No extends Error {
  constructor(code, detail, status = 0) {
    super(detail ? `${code}: ${detail}` : code);
    this.code = code;
    this.status = status;
  }
}

export const operator = {
  get now() {
    return JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
  },
  signIn: (key, name) => sessionStorage.setItem(KEPT, JSON.stringify({ key, name })),
  signOut: () => sessionStorage.removeItem(KEPT),
};

const part = encodeURIComponent;

async function call(path, { method = "GET", body, key, text = false, patienceMs = PATIENCE_MS } = {}) {
  const { key: secret, name } = operator.now ?? {};
  let response;
  try {
    response = await fetch(path, {
      method,
      cache: "no-store",
      signal: timeout(patienceMs),
      body: body && JSON.stringify(body),
      headers: {
        Authorization: `Bearer ${secret}`,
        "X-Operator": name,
        ...(body && { "Content-Type": "application/json" }),
        ...(key && { "Idempotency-Key": key }),
      },
    });
    if (text && response.ok) return await response.text();
    const answer = await response.json();
    if (response.ok) return answer;
    throw new No(answer.code ?? "refused", answer.detail, response.status);
  } catch (error) {
    if (error instanceof No) throw error;
    const changed = method === "GET" ? "" : " Whether it was done cannot be told: look before you do it again.";
    throw new No("no answer", `The service cannot be reached.${changed}`, response?.status);
  }
}

const sale = (saleId, ...more) => ["/v1/admin/sales", part(saleId), ...more].join("/");

/** Every sale: live ones first, then upcoming, then past. */
export async function listSales() {
  const sales = [];
  for (let cursor = ""; cursor !== null; ) {
    const page = await call(`/v1/sales${cursor && `?cursor=${part(cursor)}`}`);
    sales.push(...page.sales);
    cursor = page.nextCursor ?? null;
  }
  return sales;
}
export const getSale = (saleId) => call(sale(saleId));
/** `verb`: pause, resume or close. */
export const turn = (saleId, verb, reason) =>
  call(sale(saleId, verb), { method: "POST", body: { reason } });
export const restock = (saleId, wish, key) =>
  call(sale(saleId, "stock"), { method: "POST", body: wish, key });
export const audit = (saleId) => call(sale(saleId, "audit"), { patienceMs: AUDIT_PATIENCE_MS });
export const listOrders = (wish) =>
  call(`/v1/admin/orders?${new URLSearchParams(Object.entries(wish).filter(([, value]) => value))}`);
export const getOrder = (orderId) => call(`/v1/admin/orders/${part(orderId)}`);
export const refund = (orderId, wish, key) =>
  call(`/v1/admin/orders/${part(orderId)}/refund`, { method: "POST", body: wish, key });
export const metrics = () => call("/metrics", { text: true });
