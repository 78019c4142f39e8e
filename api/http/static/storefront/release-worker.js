// Outlives the page: releases the hold of a buyer who has left the shop. release-on-leave.js says why.

/** Far longer than a reload leaves no page open; a release this much later harms no buyer. */
const GRACE_MS = 3_000;

async function releaseUnlessBack({ orderId, token }) {
  await new Promise((done) => setTimeout(done, GRACE_MS));
  const windows = await self.clients.matchAll({ type: "window", includeUncontrolled: true });
  if (windows.length) return;
  // The body of navigator.sendBeacon: the token, alone, as text. If it is lost, the hold expires.
  await fetch(`/v1/reservations/${encodeURIComponent(orderId)}/release`, {
    method: "POST",
    headers: { "Content-Type": "text/plain" },
    body: token,
  });
}

self.addEventListener("message", (event) => event.waitUntil(releaseUnlessBack(event.data)));
