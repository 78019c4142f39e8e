// Outlives the page: releases the hold of a buyer who has left the shop. leave.js says why.

/** Far longer than a reload is without a page; a hold that ends this much later hurts nobody. */
const GRACE_MS = 3_000;

async function releaseUnlessBack({ orderId, token }) {
  await new Promise((done) => setTimeout(done, GRACE_MS));
  const windows = await self.clients.matchAll({ type: "window", includeUncontrolled: true });
  if (windows.length) return;
  // What navigator.sendBeacon would send: the token, alone, as text. A lost one is the deadline's.
  await fetch(`/v1/reservations/${encodeURIComponent(orderId)}/release`, {
    method: "POST",
    headers: { "Content-Type": "text/plain" },
    body: token,
  });
}

self.addEventListener("message", (event) => event.waitUntil(releaseUnlessBack(event.data)));
