// The server's clock in the page, a tick each second, and its announcements.

let difference = 0;

/** Sets the clock from a response: the server's time was in the middle of the call. */
export function setClock(serverTime, tookMs) {
  difference = Date.parse(serverTime) + tookMs / 2 - performance.now();
}

/** A lower bound from a response that was written at this server time. */
export function clockAtLeast(at) {
  difference = Math.max(difference, Date.parse(at) - performance.now());
}

/** The server's time in ms. The page's own clock may be wrong by days and is never used. */
export function serverNow() {
  return performance.now() + difference;
}

/** performance.now() may stop while the machine sleeps: a lag up to this is ignored. */
const SLEPT_MS = 2_000;

/**
 * Calls `tick` at once and at each full second of the server's clock, while the page is visible.
 * `slept` is called first if the machine slept since the last tick: serverNow() is wrong then,
 * until the next response of the service.
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

/** Queue length of announcements: older ones are dropped as out of date. */
const WAITING_MAX = 3;
/** Pause between announcements, so that each is heard in full. */
const PAUSE_MS = 4_000;

/** Announces sentences to screen readers through a live region, one after the other. */
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
