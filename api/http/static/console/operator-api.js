// Calls of the operator's API, with the key and the name stored in this tab.

import { Refusal, request } from "../reservation.js";
import { tab } from "../common/storage.js";

/** Time-out of a call. */
const TIMEOUT_MS = 60_000;
/** An audit reads every order of the sale: half a minute for seventy thousand of them. */
const AUDIT_TIMEOUT_MS = 1_800_000;

export const operator = {
  get current() {
    return tab.get("operator");
  },
  signIn: (key, name) => tab.set("operator", { key, name }),
  signOut: () => tab.forget("operator"),
};

const part = encodeURIComponent;

/** A header carries ASCII: any other name is an extended value of RFC 8187. */
const nameHeader = (name) =>
  /^[ -~]+$/.test(name) && !/^utf-8''/i.test(name) ? name : `UTF-8''${part(name).replace(/['()*]/g, (sign) => `%${sign.charCodeAt(0).toString(16)}`)}`;

async function call(path, { method = "GET", key, etag, ...options } = {}) {
  const { key: secret, name } = operator.current ?? {};
  try {
    return await request(path, {
      method,
      timeoutMs: TIMEOUT_MS,
      ...options,
      headers: {
        Authorization: `Bearer ${secret}`,
        ...(name && { "X-Operator": nameHeader(name) }),
        ...(key && { "Idempotency-Key": key }),
        ...(etag && { "If-Match": etag }),
      },
    });
  } catch (refusal) {
    if (refusal.code !== "network") throw refusal;
    const outcome = method === "GET" ? "" : " The change may have been made: check before you repeat it.";
    throw new Refusal("network", refusal.status, { detail: `The service did not answer.${outcome}` });
  }
}

const sale = (saleId, ...more) => ["/v1/admin/sales", part(saleId), ...more].join("/");

/** Every sale, drafts included: live ones first, then upcoming, then past. */
export async function listSales() {
  const sales = [];
  for (let cursor = ""; cursor !== null; ) {
    const page = await call(`/v1/admin/sales${cursor && `?cursor=${part(cursor)}`}`);
    sales.push(...page.sales);
    cursor = page.nextCursor;
  }
  return sales;
}
export const getSale = (saleId) => call(sale(saleId));
/** The sale and the ETag that an update of it needs. */
export async function getSaleToEdit(saleId) {
  let etag = "";
  const read = await call(sale(saleId), { onHeaders: (headers) => (etag = headers.get("ETag") ?? "") });
  return { sale: read, etag };
}
/** Creates the sale, or with the `etag` of an earlier read updates it. */
export const putSale = (saleId, definition, etag) =>
  call(sale(saleId), { method: "PUT", body: definition, etag });
/** `verb`: pause, resume, close or archive. */
export const changeState = (saleId, verb, reason) =>
  call(sale(saleId, verb), { method: "POST", body: { reason } });
export const restock = (saleId, change, key) =>
  call(sale(saleId, "stock"), { method: "POST", body: change, key });
export const audit = (saleId) => call(sale(saleId, "audit"), { timeoutMs: AUDIT_TIMEOUT_MS });
export const listOrders = (filter) =>
  call(`/v1/admin/orders?${new URLSearchParams(Object.entries(filter).filter(([, value]) => value))}`);
export const getOrder = (orderId) => call(`/v1/admin/orders/${part(orderId)}`);
export const refund = (orderId, order, key) =>
  call(`/v1/admin/orders/${part(orderId)}/refund`, { method: "POST", body: order, key });
/** `verb`: release or resolve. */
export const changeOrder = (orderId, verb, reason) =>
  call(`/v1/admin/orders/${part(orderId)}/${verb}`, { method: "POST", body: { reason } });
export const saleHistory = (saleId, cursor) =>
  call(`${sale(saleId, "history")}?${new URLSearchParams({ limit: 20, ...(cursor && { cursor }) })}`);
/** The name, role and rights of the key. */
export const identity = () => call("/v1/admin/operator");
export const listKeys = (cursor) => call(`/v1/admin/keys?${new URLSearchParams({ limit: 50, ...(cursor && { cursor }) })}`);
export const createKey = (request) => call("/v1/admin/keys", { method: "POST", body: request });
export const revokeKey = (keyId, reason) =>
  call(`/v1/admin/keys/${part(keyId)}?${new URLSearchParams({ reason })}`, { method: "DELETE" });
export const metrics = () => call("/metrics", { read: "text" });
