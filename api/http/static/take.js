// Taking a basket once: one key for one wish, however often it has to be asked.

import { listReservations, prepare, Refusal } from "./api.js";
import { newKey } from "./key.js";
import { tab } from "./remember.js";

/** How often one press of Buy asks: after "not now" or a lost answer again, with the same key. */
const ASKED_MAX = 4;
/** How long the n-th repeat waits at least. */
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
 * @param ask.admission gives the sale's admission; called with true for a fresh one
 * @param ask.onRepeat is told that it is asked again: the answer was lost, or was "not now"
 * @throws {Refusal} of which `unclear` says that the same press may be repeated
 */
export async function take(saleId, items, amount, ask) {
  let { wish, same } = remembered(saleId, items, amount);
  if (wish && !same) {
    // What became of the last basket was never told. If it was taken, that is the hold there is.
    const found = (await listReservations(saleId)).find(isLive);
    if (found) return found;
  }
  if (!same) wish = newWish(saleId, items, amount);
  let admission = await ask.admission(false);
  let lost;
  // A wish that is remembered is one whose answer was never told.
  let untold = same;
  for (let asked = 1; ; asked++) {
    try {
      const { reservation } = await prepare(saleId, { key: wish.key, items, amount, admission });
      if (!UNPAID_END.has(reservation.status)) {
        forgetWish(saleId);
        return reservation;
      }
      // The key's hold was given back or ran out since: this press is a new wish.
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
        // "Not now" tells nothing of an earlier call whose answer was lost.
        const verdict = passes ? (lost ?? refusal) : refusal;
        // Nor does any other refusal, for most come before the key is looked at: the same key may
        // still find the hold.
        if (!untold || verdict.code === "idempotency_key_reused") forgetWish(saleId);
        throw verdict;
      }
      if (stale) {
        admission = await ask.admission(true);
        continue;
      }
      ask.onRepeat();
      const least = Math.max(refusal.retryAfter * 1000, PAUSE_MS * asked);
      // Thousands are put off at one moment, and must not come back at one.
      await pause(least * (1 + Math.random() / 2));
    }
  }
}
