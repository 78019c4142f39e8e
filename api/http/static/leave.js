// Gives a hold back when its buyer leaves the shop, and only then.
//
// At `pagehide` a page that is reloaded and one whose tab is closed look the same: both are not
// `persisted`, and no event tells them apart. A beacon sent there would take the hold of everybody
// who reloads. So the page hands the word to a worker that outlives it, which sends it a few seconds
// later, unless a window of this shop is open by then: a reload is back long before, the way back
// from the next page too. Nothing is sent where
//   - the page may come back as it was (`persisted`: the browser keeps it for the back button),
//   - a payment was begun in this tab: the buyer is on the payment page and comes back from there,
//   - the page is merely hidden (another app, another tab): there is no `pagehide` then.
// Where there is no worker, the deadline gives the hold back.

import { tab } from "./remember.js";

const WORKER = "/static/leave-worker.js";

let registration = null;

const paid = (orderId) => `paying.${orderId}`;

/** To be called before the PG is. The tab remembers it over reloads and the way there and back. */
export function paymentBegins(orderId) {
  tab.set(paid(orderId), true);
}

/** Only now, when there is something to give back, is there a worker to be had. */
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
    (error) => console.info("holds end by their deadline alone here:", error.message),
  );
}

if (tab.get("hold")) startWorker();

addEventListener("pagehide", (event) => {
  const hold = tab.get("hold");
  if (event.persisted || !hold || tab.get(paid(hold.orderId))) return;
  registration?.active?.postMessage(hold);
});
