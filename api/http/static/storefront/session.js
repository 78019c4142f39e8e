// The buyer's session: the client of the service, and sign-in as a guest.

import { connect, Refusal } from "../reservation.js";
import { browser } from "../common/storage.js";

let signingIn = null;

async function newGuest() {
  try {
    return await connect().guest();
  } catch (refusal) {
    // The shop's buyers have accounts: the site that embeds these pages has to sign them in.
    if (refusal.status === 404) throw new Refusal("no_guests", 404);
    throw refusal;
  }
}

/** A token other than the expired one, which may be null: another tab's, or a new guest's. */
async function renew(expired) {
  const before = browser.get("buyer");
  if (before && before !== expired) return before;
  signingIn ??= newGuest().finally(() => (signingIn = null));
  const guest = await signingIn;
  // Another tab may have signed in first: both must be the same buyer.
  const other = browser.get("buyer");
  if (other && other !== expired) return other;
  browser.set("buyer", guest.token);
  return guest.token;
}

/** Ensures that this browser has a token; a visit alone needs none. */
export const signIn = () => renew(null);

export const isSignedIn = () => browser.get("buyer") !== null;

export const shop = connect({ token: (expired) => (expired ? renew(expired) : browser.get("buyer")) });
