// Takes a basket once: one idempotency key for one wish, over all retries.

import { listReservations, prepare, Refusal } from "./api.js";
import { newKey } from "../shared/idempotency-key.js";
import { tab } from "../shared/storage.js";

/** Attempts of one press of Buy: after a temporary refusal or a lost answer, with the same key. */
const ASKED_MAX = 4;
/** Minimum back-off before the n-th retry: n times this. */
const PAUSE_MS = 700;

const LIVE = new Set(["HELD", "PREPARED"]);
const UNPAID_END = new Set(["RELEASED", "EXPIRED"]);

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** Whether it can still be paid. */
export function isLive(reservation) {
  return LIVE.has(reservation.status);
}

const place = (saleId) => `wish.${saleId}`;

/** The wish is granted or refused: the next one gets a key of its own. */
export function forgetWish(saleId) {
  tab.forget(place(saleId));
}

function remembered(saleId, items, amount) {
  const wish = tab.get(place(saleId));
  const same = wish && JSON.stringify([wish.items, wish.amount]) === JSON.stringify([items, amount]);
  return { wish, same };
}

function newWish(saleId, items, amount) {
  const wish = { key: newKey(), items, amount };
  tab.set(place(saleId), wish);
  return wish;
}

/**
 * Takes these items, or finds that they are taken.
 *
 * @param ask.admission returns the sale's admission; called with true for a fresh one
 * @param ask.onRepeat is called before a retry: the answer was lost, or the refusal was temporary
 * @throws {Refusal} with `unclear` true if the same press may be repeated
 */
export async function take(saleId, items, amount, ask) {
  let { wish, same } = remembered(saleId, items, amount);
  if (wish && !same) {
    // The outcome of the last basket is unknown. If it was taken, its hold is the live one.
    const found = (await listReservations(saleId)).find(isLive);
    if (found) return found;
  }
  if (!same) wish = newWish(saleId, items, amount);
  let admission = await ask.admission(false);
  let lost;
  // A remembered wish is one with an unknown outcome.
  let untold = same;
  for (let asked = 1; ; asked++) {
    try {
      const { reservation } = await prepare(saleId, { key: wish.key, items, amount, admission });
      if (!UNPAID_END.has(reservation.status)) {
        forgetWish(saleId);
        return reservation;
      }
      // The key's hold was released or expired since: this press is a new wish.
      if (asked === ASKED_MAX) throw new Refusal("unavailable");
      wish = newWish(saleId, items, amount);
      lost = undefined;
      untold = false;
    } catch (refusal) {
      if (!(refusal instanceof Refusal)) throw refusal;
      if (refusal.unclear) lost = refusal;
      untold ||= refusal.unclear;
      const stale = refusal.code === "invalid_admission" && asked === 1;
      const passes = refusal.unclear || refusal.code === "unavailable";
      if (asked === ASKED_MAX || !(passes || stale)) {
        // A temporary refusal is no evidence about an earlier call whose answer was lost.
        const verdict = passes ? (lost ?? refusal) : refusal;
        // Nor is any other refusal, for most come before the key is checked: the same key may still
        // find the hold.
        if (!untold || verdict.code === "idempotency_key_reused") forgetWish(saleId);
        throw verdict;
      }
      if (stale) {
        admission = await ask.admission(true);
        continue;
      }
      ask.onRepeat();
      const least = Math.max(refusal.retryAfter * 1000, PAUSE_MS * asked);
      // Thousands are refused at one moment, and must not retry at one moment.
      await pause(least * (1 + Math.random() / 2));
    }
  }
}
