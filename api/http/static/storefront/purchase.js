// Purchases a basket once: one idempotency key for one purchase, over all attempts.

import { newKey, Refusal } from "../reservation.js";
import { tab } from "../common/storage.js";
import { shop, signIn } from "./session.js";

/** Prepares of one press of Buy, each with the client's own retries. */
const PREPARES_MAX = 4;

const LIVE = new Set(["HELD", "PREPARED"]);
const ENDED_UNPAID = new Set(["RELEASED", "EXPIRED"]);

/** Whether it can still be paid. */
export function isLive(reservation) {
  return LIVE.has(reservation.status);
}

// Its name in the storage is that of 0.1.0: an upgrade keeps the pending purchases of open tabs.
const place = (saleId) => `wish.${saleId}`;

/** The purchase is granted or refused: the next one gets a key of its own. */
export function forgetPurchase(saleId) {
  tab.forget(place(saleId));
}

function begin(saleId, items, amount) {
  const purchase = { key: newKey(), items, amount };
  tab.set(place(saleId), purchase);
  return purchase;
}

const basketOf = ({ items, amount }) => JSON.stringify([items, amount]);

/**
 * Prepares these items, or finds the reservation that an earlier attempt has prepared.
 *
 * @param options.admission returns the sale's admission; called with true for a fresh one
 * @param options.onRetry is called before a retry: the response was lost, or the refusal temporary
 * @throws {Refusal} with `unclear` true if the same press may be repeated
 */
export async function purchase(saleId, items, amount, { admission, onRetry }) {
  await signIn();
  const pending = tab.get(place(saleId));
  const isRepeat = pending !== null && basketOf(pending) === basketOf({ items, amount });
  if (pending && !isRepeat) {
    // The outcome of the last basket is unknown. If it was prepared, its hold is the live one.
    const live = (await shop.reservations(saleId)).find(isLive);
    if (live) return live;
  }
  let { key } = isRepeat ? pending : begin(saleId, items, amount);
  let unclear = isRepeat;
  let pass = await admission(false);
  for (let made = 1; ; made++) {
    try {
      const reservation = await shop.prepare(saleId, { key, items, amount, admission: pass, onRetry });
      if (!ENDED_UNPAID.has(reservation.status)) {
        forgetPurchase(saleId);
        return reservation;
      }
      // The key's hold was released or expired since: this press is a new purchase.
      if (made === PREPARES_MAX) throw new Refusal("unavailable");
      ({ key } = begin(saleId, items, amount));
      unclear = false;
    } catch (refusal) {
      if (!(refusal instanceof Refusal)) throw refusal;
      unclear ||= refusal.unclear;
      if (refusal.code === "invalid_admission" && made === 1) {
        pass = await admission(true);
        continue;
      }
      // Most refusals come before the key is checked: the same key may still find the hold of an
      // attempt whose response was lost.
      if (!unclear || refusal.code === "idempotency_key_reused") forgetPurchase(saleId);
      throw refusal;
    }
  }
}
