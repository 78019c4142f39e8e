// Rates and latencies from the service's metrics: of the last moments, not since the start.

/** The bucket's upper bound for this quantile of the observations; null without any. */
function quantile(buckets, share) {
  const sorted = [...buckets].sort(([one], [other]) => one - other);
  const all = sorted[sorted.length - 1]?.[1] ?? 0;
  if (!all) return null;
  return sorted.find(([, count]) => count >= share * all)[0];
}

/** A prepare that was answered with a reservation. */
const HELD = { operation: "prepareReservation", status: "201" };

const LINE = /^([a-z_]+)(?:\{(.*)\})? (\S+)$/i;

function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = LINE.exec(line);
    if (!found) continue;
    const labels = Object.fromEntries(
      [...(found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, name, value]) => [name, value]),
    );
    samples.push({ name: found[1], labels, value: Number(found[3]) });
  }
  return samples;
}

const sum = (samples, name, wanted = {}) =>
  samples
    .filter((one) => one.name === name && Object.entries(wanted).every(([key, value]) => one.labels[key] === value))
    .reduce((total, one) => total + one.value, 0);

function prepareBuckets(samples) {
  const buckets = new Map();
  for (const { name, labels, value } of samples) {
    if (name !== "reservation_http_request_seconds_bucket" || labels.operation !== "prepareReservation") continue;
    const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
    buckets.set(bound, (buckets.get(bound) ?? 0) + value);
  }
  return buckets;
}

/** Keeps the last reading, since a rate is a difference. */
export class Figures {
  #before = null;

  /** Rows of {name, value, bad} for one sale. */
  read(text, saleId, at = performance.now()) {
    const samples = parse(text);
    const held = sum(samples, "reservation_http_request_seconds_count", HELD);
    const buckets = prepareBuckets(samples);
    const before = this.#before;
    this.#before = { held, buckets, at };
    const backlog = sum(samples, "reservation_outbox_backlog_events", { sale: saleId });
    const age = sum(samples, "reservation_outbox_oldest_seconds", { sale: saleId });
    const undecided = sum(samples, "reservation_undecided_payments", { sale: saleId });
    const alarms = sum(samples, "reservation_alarms_total");
    return [
      { name: "Holds a second", value: rate(before, held, at) },
      { name: "Prepare, p99", value: p99(before, buckets) },
      { name: "Events not in SQL", value: backlog.toLocaleString("en") },
      { name: "Oldest of them", value: `${age.toFixed(1)} s`, bad: age > 60 },
      { name: "Payments under way", value: undecided.toLocaleString("en") },
      { name: "Alarms since start", value: alarms.toLocaleString("en"), bad: alarms > 0 },
    ];
  }
}

function rate(before, held, at) {
  if (!before || held < before.held) return "–";
  const perSecond = ((held - before.held) * 1000) / (at - before.at);
  return perSecond.toLocaleString("en", { maximumFractionDigits: perSecond < 10 ? 1 : 0 });
}

function p99(before, buckets) {
  if (!before) return "–";
  const since = new Map([...buckets].map(([bound, count]) => [bound, count - (before.buckets.get(bound) ?? 0)]));
  const found = quantile(since, 0.99);
  if (found === null) return "–";
  return found === Infinity ? "over 30 s" : `≤ ${found * 1000} ms`;
}
