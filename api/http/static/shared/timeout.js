// A time-out for a request, also where AbortSignal.timeout is missing (Safari 15, Chrome 102).

/** A signal that aborts after so many milliseconds. */
export function timeout(ms) {
  if (AbortSignal.timeout) return AbortSignal.timeout(ms);
  const controller = new AbortController();
  setTimeout(() => controller.abort(), ms);
  return controller.signal;
}
