// A tick at each second of the server's clock, and the announcements of a page.

import { shop } from "./session.js";

/** A smaller jump is not a change of the device's clock. */
const JUMP_MS = 2_000;

/**
 * Calls `tick` at once and at each full second of the server's clock, while the page is visible.
 * `jumped` is called first if the machine slept or its clock was set since the last tick: the
 * page is out of date then, and its clock may be wrong until the next reading of the sale.
 */
export function eachSecond(tick, jumped) {
  let timer = 0;
  // performance.now() may stop while the machine sleeps, and ignores changes of the clock.
  const difference = () => Date.now() - performance.now();
  let last = difference();
  const run = () => {
    clearTimeout(timer);
    const before = last;
    last = difference();
    if (Math.abs(last - before) > JUMP_MS) jumped();
    tick();
    if (!document.hidden) timer = setTimeout(run, 1000 - (shop.now() % 1000));
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
