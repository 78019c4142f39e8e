// The live stock, as server-sent events, while the page is visible.

/** A refused stream is retried after this, plus up to as much again. */
const RETRY_MS = 3_000;

/**
 * Calls `onStock` with each change. A hidden page closes its stream: a browser has six connections
 * for all tabs of a shop.
 */
export function watchStock(saleId, onStock) {
  let stream = null;
  let retry = 0;

  const close = () => {
    clearTimeout(retry);
    stream?.close();
    stream = null;
  };
  const open = () => {
    if (stream || document.hidden) return;
    clearTimeout(retry);
    stream = new EventSource(`/v1/sales/${encodeURIComponent(saleId)}/events`);
    stream.addEventListener("stock", (event) => onStock(JSON.parse(event.data)));
    stream.addEventListener("error", () => {
      // The browser reconnects by itself, unless the answer was a refusal.
      if (stream?.readyState !== EventSource.CLOSED) return;
      close();
      retry = setTimeout(open, RETRY_MS * (1 + Math.random()));
    });
  };

  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);
  open();
}
