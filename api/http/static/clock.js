// The server's clock in the page, a tick each second, and what is said aloud of it.

let difference = 0;

/** Set by an answer: the server's time was in the middle of the call. */
export function setClock(serverTime, tookMs) {
  difference = Date.parse(serverTime) + tookMs / 2 - performance.now();
}

/** An answer was written at this time of the server's: it cannot be earlier than that now. */
export function clockAtLeast(at) {
  difference = Math.max(difference, Date.parse(at) - performance.now());
}

/** The server's time in ms. The page's own clock may be wrong by days: it is never asked. */
export function serverNow() {
  return performance.now() + difference;
}

/** The page's own clock may stand still while the machine sleeps: by so much it may lag unnoticed. */
const SLEPT_MS = 2_000;

/**
 * Calls `tick` at once and at the turn of each of the server's seconds, while the page is seen.
 * `slept` is called first where the machine slept since the last one: serverNow() is wrong then,
 * until the service was asked.
 */
export function eachSecond(tick, slept) {
  let timer = 0;
  const lag = () => Date.now() - performance.now();
  let lagged = lag();
  const run = () => {
    clearTimeout(timer);
    const before = lagged;
    lagged = lag();
    if (lagged - before > SLEPT_MS) slept();
    tick();
    if (!document.hidden) timer = setTimeout(run, 1000 - (((serverNow() % 1000) + 1000) % 1000));
  };
  document.addEventListener("visibilitychange", run);
  run();
}

/** How many words may wait: what is older than that is no news. */
const WAITING_MAX = 3;
/** One at a time, far enough apart to be heard out. */
const PAUSE_MS = 4_000;

/** Says things to screen readers through a live region, one after the other. */
export function announcer(region) {
  const waiting = [];
  let busy = false;
  const next = () => {
    busy = waiting.length > 0;
    if (!busy) return;
    region.textContent = waiting.shift();
    setTimeout(next, PAUSE_MS);
  };
  return (sentence) => {
    if (waiting.includes(sentence)) return;
    waiting.push(sentence);
    if (waiting.length > WAITING_MAX) waiting.shift();
    if (!busy) next();
  };
}
