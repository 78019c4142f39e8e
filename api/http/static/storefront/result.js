// The result page after the payment page: the outcome, and whether money was taken.

import { getReservation, Refusal } from "./api.js";
import { forgetBasket } from "./basket.js";
import { language, moment, money, t, translatePage } from "../shared/i18n.js";

/** A payment is decided within 13 minutes; each poll waits up to 25 s for it. */
const LOOKS_MAX = 36;
/** Back-off after a failed poll. */
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
  $("what").textContent = title;
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
async function look(wait) {
  try {
    return await getReservation(orderId, { token, wait });
  } catch (refusal) {
    const mayBeOurs = token && (refusal.status === 401 || refusal.status === 404);
    if (!mayBeOurs) throw refusal;
    return await getReservation(orderId, { wait });
  }
}

function showUnread(refusal) {
  if (refusal.status === 401 || refusal.status === 404) {
    // This browser may not read the order, but the service's redirect carries the outcome.
    show(UNPAID.has(outcome) || outcome === "invalid" ? outcome : "unreadable");
  } else if (refusal.code === "hold_lost") show("expired");
  else show("offline");
}

/** Polls until the payment is decided. */
async function follow() {
  if (!orderId) return show("invalid");
  for (let looks = 0; looks < LOOKS_MAX; looks++) {
    const asked = performance.now();
    try {
      const reservation = await look(looks > 0);
      show(kindOf(reservation), reservation);
      if (!hidesAccount(reservation) && reservation.status !== "CONFIRMING") return;
      // If a buyer has many tabs, some long polls return at once.
      const atOnce = looks > 0 && performance.now() - asked < PAUSE_MS;
      if (atOnce || hidesAccount(reservation)) await pause(PAUSE_MS);
    } catch (refusal) {
      if (!(refusal instanceof Refusal)) throw refusal;
      showUnread(refusal);
      if (refusal.status !== 0 && refusal.status < 500) return;
      await pause(PAUSE_MS);
    }
  }
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
