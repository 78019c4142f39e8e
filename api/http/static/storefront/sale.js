// One sale: its clock and stock, the basket, the hold, and the start of the payment.

import { Refusal } from "../reservation.js";
import { moment, money, refusalText, remaining, t, translatePage } from "../common/i18n.js";
import { Basket } from "./basket.js";
import { announcer, eachSecond } from "./clock.js";
import { Hold } from "./hold.js";
import { forgetPurchase, isLive, purchase } from "./purchase.js";
import { isSignedIn, shop } from "./session.js";

/** An admission is valid for ten minutes; an older one than this is renewed. */
const ADMISSION_MS = 8 * 60_000;
/** A page that was hidden for longer reads the sale again. */
const STALE_MS = 10_000;
/** Every page sees the sale open at the same instant: their requests are spread over this. */
const SPREAD_MS = 3_000;
/** Attempts of the first reading: hours of an outage. */
const FIRST_ATTEMPTS_MAX = 1_000;
/** A failed refresh is shown at once: the next event of the page reads again. */
const ONCE = { attempts: 1 };
/** Refusals after which a refresh would fail as well and hide the first message. */
const UNREACHABLE = new Set(["network", "outcome_unknown", "rate_limited"]);

const saleId = decodeURIComponent(location.pathname.split("/")[2] ?? "");
const $ = (id) => document.getElementById(id);
const say = announcer($("announcer"));

let sale = null;
let readAt = -Infinity;
let busy = false;

const basket = new Basket({
  list: $("items"),
  template: $("item"),
  say,
  onChange: drawTill,
});

const hold = new Hold({
  say,
  nameOf: (sku) => basket.nameOf(sku),
  takesAccounts: () => sale?.virtualAccounts ?? false,
  notice,
  refused,
  over: () => refreshReservations({ after: t("holdOver") }),
  ended(sentence) {
    hold.show(null);
    drawTill();
    notice(sentence, { focus: true });
    refreshReservations();
  },
});

function notice(sentence, { focus = false } = {}) {
  $("notice").textContent = sentence;
  $("notice").hidden = !sentence;
  if (focus) $("notice").focus();
}

/** Shows the refusal, and reloads the data that may have caused it. */
function refused(refusal) {
  notice(refusalText(refusal));
  $("notice").scrollIntoView({ block: "nearest" });
  if (UNREACHABLE.has(refusal.code)) return;
  refreshSale();
  refreshReservations();
}

/** Between two readings the clock decides the shown status; the server decides each purchase. */
function statusNow() {
  const now = shop.now();
  if (now >= Date.parse(sale.closesAt)) return "closed";
  if (sale.status === "scheduled" && now >= Date.parse(sale.opensAt)) return "open";
  return sale.status;
}

let shownStatus = "";

function drawHead() {
  const status = statusNow();
  const opens = status === "scheduled";
  const counts = opens || status === "open" || status === "paused" || status === "sold_out";
  const until = Date.parse(opens ? sale.opensAt : sale.closesAt);
  $("countdown").hidden = !counts;
  $("countdown").querySelector("span").textContent = t(opens ? "opensIn" : "closesIn");
  $("countdown").querySelector("strong").textContent = remaining(until - shop.now());
  if (status === shownStatus) return;
  if (shownStatus) statusChanged(status);
  shownStatus = status;
  $("status").textContent = t(`status.${status}`);
  $("status").dataset.status = status;
  $("when").textContent = opens
    ? t("opensAt", { time: moment(sale.opensAt) })
    : t(status === "closed" ? "closedAt" : "closesAt", { time: moment(sale.closesAt) });
  drawTill();
}

function statusChanged(status) {
  if (status === "open") say(t("say.opened"));
  if (status === "closed") say(t("say.closed"));
  setTimeout(refreshSale, Math.random() * SPREAD_MS);
}

function drawTill() {
  if (!sale) return;
  const { amount } = basket;
  const buyable = ["open", "sold_out", "paused"].includes(statusNow());
  $("basket").hidden = Boolean(hold.current);
  $("total").textContent = money(amount, sale.currency);
  $("buy").disabled = busy || !buyable || amount === 0 || basket.soldOut;
  $("buy").textContent = t(busy ? "buying" : "buy");
  $("hint").textContent = buyable ? hint(amount) : t(`status.${statusNow()}`);
}

function hint(amount) {
  if (amount === 0) return t("choose");
  if (basket.soldOut) return t("soldOut");
  if (sale.holdPolicy === "success") return t("policySuccess");
  const { holdSeconds } = sale;
  const unit = holdSeconds < 60 ? ["seconds", holdSeconds] : ["minutes", Math.floor(holdSeconds / 60)];
  return t("policyHold", { minutes: t(unit[0], { count: unit[1] }) });
}

function drawOrders(reservations) {
  // The live one has its own place; those that ended unpaid are of no use to the buyer.
  const shown = reservations.filter(({ status }) =>
    ["CONFIRMING", "AWAITING_DEPOSIT", "CONFIRMED", "REFUNDED"].includes(status),
  );
  $("orders").hidden = shown.length === 0;
  $("order-list").replaceChildren(...shown.map(orderLine));
}

function orderLine({ orderId, orderName, status, amount, currency }) {
  const line = document.createElement("li");
  const link = document.createElement("a");
  const state = document.createElement("span");
  link.href = `/result?${new URLSearchParams({ orderId })}`;
  link.textContent = `${orderName}, ${money(amount, currency)}`;
  state.textContent = t(`order.${status}`);
  line.append(link, state);
  return line;
}

/** Runs a read of the service; a failure is shown, and the page keeps its content. */
async function reading(read) {
  try {
    await read();
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    notice(refusalText(refusal, { reading: true }));
  }
}

async function readSale(options) {
  sale = await shop.sale(saleId, options);
  readAt = performance.now();
  translatePage(sale.name);
  $("name").textContent = sale.name;
  $("description").textContent = sale.description ?? "";
  $("description").hidden = !sale.description;
  basket.show(sale);
  drawHead();
  drawTill();
  $("head").hidden = false;
}

const refreshSale = () => reading(() => readSale(ONCE));

/** A list read before a hold came or went is stale, and is read again. */
async function listWhileUnchanged() {
  for (;;) {
    const before = hold.current?.orderId;
    // Without a token the browser has no reservations.
    const reservations = isSignedIn() ? await shop.reservations(saleId, ONCE) : [];
    if (hold.current?.orderId === before) return reservations;
  }
}

/** The service owns the reservations: a reload, a way back and another tab all continue them. */
function refreshReservations({ after = "" } = {}) {
  return reading(async () => {
    const reservations = await listWhileUnchanged();
    drawOrders(reservations);
    const live = reservations.find(isLive) ?? null;
    const before = hold.current;
    if (live) {
      // The hold of the lost response has been found.
      forgetPurchase(saleId);
      hold.show(live.orderId === before?.orderId ? { ...live, token: before.token } : live);
    } else {
      hold.show(null);
      if (before) notice(endOf(reservations, before) || after || t("endedElsewhere"));
    }
    drawTill();
  });
}

/** The message for a hold that ended in a payment, by the list of orders. */
function endOf(reservations, { orderId }) {
  const status = reservations.find((found) => found.orderId === orderId)?.status;
  if (status === "CONFIRMING") return t("settlingHere");
  if (status === "AWAITING_DEPOSIT") return t("depositHere");
  return status === "CONFIRMED" ? t("error.already_confirmed") : "";
}

const purchaseOptions = {
  async admission(fresh) {
    if (!sale.requireAdmission) return undefined;
    const stale = !sale.admission || performance.now() - readAt > ADMISSION_MS;
    // The service issues it to a buyer.
    if (fresh || stale) await readSale();
    return sale.admission;
  },
  onRetry: () => notice(t("stillTrying")),
};

async function buy() {
  busy = true;
  drawTill();
  notice("");
  try {
    const reservation = await purchase(saleId, basket.lines, basket.amount, purchaseOptions);
    if (isLive(reservation)) {
      hold.show(reservation);
      notice("");
    } else {
      await refreshReservations();
      notice(endOf([reservation], reservation));
    }
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    refused(refusal);
  } finally {
    busy = false;
    drawTill();
  }
  if (hold.current) hold.focus();
}

/** Under load the first reading may be refused or lost: it is retried until it is final. */
async function firstReading() {
  const show = (refusal) => {
    $("loading").hidden = true;
    notice(refusalText(refusal, { reading: true }));
  };
  let retried = false;
  const onRetry = (refusal) => {
    retried = true;
    show(refusal);
  };
  try {
    await readSale({ attempts: FIRST_ATTEMPTS_MAX, onRetry });
    if (retried) notice("");
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    show(refusal);
  }
}

/** Reads everything that may have changed while the page was hidden or offline. */
function refreshAll() {
  refreshSale();
  refreshReservations();
}

async function start() {
  translatePage();
  await Promise.all([firstReading(), refreshReservations()]);
  $("loading").hidden = true;
  if (!sale) return;
  // Its lines may have been drawn before the items' names were known.
  if (hold.current) hold.show(hold.current);
  drawTill();
  eachSecond(() => {
    drawHead();
    hold.tick();
  }, refreshAll);
  addEventListener("online", refreshAll);
  shop.stock(saleId, (change) => basket.stock(change));
}

$("basket").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!busy) buy();
});
addEventListener("pageshow", (event) => {
  // Restored from the browser's back/forward cache: changes since are missing.
  if (event.persisted) refreshAll();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden || !sale || performance.now() - readAt < STALE_MS) return;
  refreshAll();
});
start();
