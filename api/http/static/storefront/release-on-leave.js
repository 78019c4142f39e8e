// Releases a hold when its buyer leaves the shop, and only then.
//
// At `pagehide` a reload and a closed tab cannot be distinguished: both are not `persisted`, and no
// event differs. A beacon sent there would release the hold at every reload. So the page passes the
// token to a worker that outlives it. The worker sends it a few seconds later, unless a window of
// this shop is open by then: a reload takes less time, and so does the way back from the next page.
// No release is sent if
//   - the page may be restored (`persisted`: the browser keeps it for the back button),
//   - a payment was begun in this tab: the buyer is on the payment page and comes back from there,
//   - the page is merely hidden (another app, another tab): there is no `pagehide` then.
// Without a worker, the hold expires at its deadline.

import { tab } from "../common/storage.js";

const WORKER = "/static/storefront/release-worker.js";

let registration = null;

const paymentOf = (orderId) => `paying.${orderId}`;

/** To be called before the PG opens. The tab keeps it over reloads and the return from the PG. */
export function paymentBegins(orderId) {
  tab.set(paymentOf(orderId), true);
}

/** Starts the worker only once there is a hold to release. */
export function keepToken(orderId, token) {
  tab.set("hold", { orderId, token });
  startWorker();
}

export function dropToken() {
  tab.forget("hold");
}

function startWorker() {
  if (registration || !navigator.serviceWorker) return;
  navigator.serviceWorker.register(WORKER).then(
    (registered) => (registration = registered),
    (error) => console.info("holds of this browser end at their deadline:", error.message),
  );
}

if (tab.get("hold")) startWorker();

addEventListener("pagehide", (event) => {
  const hold = tab.get("hold");
  if (event.persisted || !hold || tab.get(paymentOf(hold.orderId))) return;
  registration?.active?.postMessage(hold);
});
