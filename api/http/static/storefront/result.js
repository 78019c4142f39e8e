// The result page after the payment page: the outcome, and whether money was taken.

import { Refusal } from "../reservation.js";
import { language, moment, money, t, translatePage } from "../common/i18n.js";
import { forgetBasket } from "./basket.js";
import { shop } from "./session.js";

/** The longest long poll that the service allows. */
const WAIT_SECONDS = 25;
/** A payment is decided within 13 minutes. */
const POLLS_MAX = 36;
/** Attempts of one poll: minutes of an outage. */
const ATTEMPTS_MAX = 20;
/** Pause after a poll that the service answered at once. */
const PAUSE_MS = 3_000;

const MARKS = { confirmed: "✓", settling: "…", awaiting_deposit: "…", offline: "…", refunded: "↩" };

/** Outcomes from the service's redirect, for the states with several possible reasons. */
const REASONS = {
  RELEASED: ["declined", "sold_out", "expired"],
  EXPIRED: ["expired", "sold_out"],
  // Nothing is held before the payment: another buyer may have been first.
  PREPARED: ["prepared", "sold_out"],
};

/** Outcomes after which the sale's page continues the same order. */
const GOES_ON = new Set(["held", "prepared"]);

const KINDS = {
  CONFIRMED: "confirmed",
  CONFIRMING: "settling",
  AWAITING_DEPOSIT: "awaiting_deposit",
  HELD: "held",
  REFUNDED: "refunded",
};

/** Outcomes for which the service's redirect stated that no money was taken. */
const UNPAID = new Set(["declined", "expired", "sold_out"]);

const $ = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const orderId = query.get("orderId") ?? "";
const outcome = query.get("outcome") ?? "";
const token = takeToken();

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** Reads the token and removes it from the URL, so that a copied link does not carry it. */
function takeToken() {
  const found = new URLSearchParams(location.hash.slice(1)).get("token");
  if (found) history.replaceState({ token: found }, "", location.pathname + location.search);
  // A reload keeps the history entry's state, and so can still read the order.
  return found ?? history.state?.token ?? null;
}

function kindOf({ status }) {
  const reasons = REASONS[status];
  if (!reasons) return KINDS[status] ?? "unreadable";
  return reasons.includes(outcome) ? outcome : reasons[0];
}

/** Only the buyer sees the account to pay in to; SQL, which stores it, may be down for a moment. */
const hidesAccount = ({ status, virtualAccount }) => status === "AWAITING_DEPOSIT" && !virtualAccount;

function show(kind, reservation = null) {
  const hidden = reservation && hidesAccount(reservation);
  const sentence = hidden ? "result.awaiting_deposit.hidden" : `result.${kind}.money`;
  const title = t(`result.${kind}`);
  const values = reservation && {
    amount: money(reservation.amount, reservation.currency),
    time: moment(reservation.expiresAt),
  };
  $("result").dataset.kind = kind;
  $("result").setAttribute("aria-busy", String(kind === "settling"));
  $("mark").textContent = MARKS[kind] ?? "!";
  $("headline").textContent = title;
  $("money").textContent = t(sentence, values ?? {});
  document.title = title;
  showAccount(reservation?.virtualAccount);
  if (reservation) showFacts(kind, reservation);
  if (kind === "confirmed") forgetBasket(reservation.saleId);
}

function showAccount(account) {
  // There is no clipboard on plain http.
  $("account-copy").hidden = !account || !navigator.clipboard;
  $("account").hidden = !account;
  if (!account) return;
  const { bank, bankEnglish, accountNumber, holderName, dueAt } = account;
  const names = language === "ko" || bank === bankEnglish ? bank : `${bankEnglish} (${bank})`;
  $("account-bank").textContent = names;
  $("account-number").textContent = accountNumber;
  $("account-holder").textContent = holderName;
  $("account-due").textContent = moment(dueAt);
}

async function copyAccount() {
  await navigator.clipboard.writeText($("account-number").textContent);
  $("account-copy").textContent = t("copied");
}

function showFacts(kind, { saleId, orderId: id, orderName, amount, currency }) {
  const sale = `/sales/${encodeURIComponent(saleId)}`;
  $("order-name").textContent = orderName;
  $("amount").textContent = money(amount, currency);
  $("order-id").textContent = id;
  $("facts").hidden = false;
  $("again").hidden = !(GOES_ON.has(kind) || UNPAID.has(kind));
  $("again").href = sale;
  $("again").textContent = t(GOES_ON.has(kind) ? "goOnPaying" : "tryAgain");
  $("back").hidden = !$("again").hidden;
  $("back").href = sale;
  $("back").textContent = t("backToSale");
}

/** By the URL's token, or, if that has expired or is another order's, as this browser's buyer. */
async function read(options) {
  try {
    return await shop.reservation(orderId, { ...options, token });
  } catch (refusal) {
    const mayBeOurs = token && (refusal.status === 401 || refusal.status === 404);
    if (!mayBeOurs) throw refusal;
    return await shop.reservation(orderId, options);
  }
}

function showRefusal(refusal) {
  if (refusal.status === 401 || refusal.status === 404) {
    // This browser may not read the order, but the service's redirect carries the outcome.
    show(UNPAID.has(outcome) || outcome === "invalid" ? outcome : "unreadable");
  } else if (refusal.code === "hold_lost") show("expired");
  else show("offline");
}

let polling = null;

/** Polls until the payment is decided; a later call takes over. */
async function follow() {
  if (!orderId) return show("invalid");
  polling?.abort();
  polling = new AbortController();
  try {
    await poll(polling.signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Refusal)) throw error;
    showRefusal(error);
  }
}

async function poll(signal) {
  for (let polls = 0; polls < POLLS_MAX && !signal.aborted; polls++) {
    const askedAt = performance.now();
    const wait = polls > 0 ? WAIT_SECONDS : 0;
    const reservation = await read({ wait, signal, attempts: ATTEMPTS_MAX, onRetry: showRefusal });
    show(kindOf(reservation), reservation);
    if (!hidesAccount(reservation) && reservation.status !== "CONFIRMING") return;
    // If a buyer has many tabs, some long polls return at once.
    const atOnce = polls > 0 && performance.now() - askedAt < PAUSE_MS;
    if (atOnce || hidesAccount(reservation)) await pause(PAUSE_MS);
  }
  if (signal.aborted) return;
  if ($("result").dataset.kind === "settling") $("money").textContent = t("result.settling.later");
}

translatePage(t("resultTitle"));
follow();
$("account-copy").addEventListener("click", copyAccount);
addEventListener("pageshow", (event) => event.persisted && follow());
// Back from the bank's app: the deposit may have arrived.
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && $("result").dataset.kind === "awaiting_deposit") follow();
});
