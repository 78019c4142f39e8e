// The operator's console: a sale's board, its orders, and the changes to them.

import { Refusal } from "../reservation.js";
import { moment, money } from "../common/i18n.js";
import { openDialog } from "./change-dialog.js";
import { Figures } from "./figures.js";
import { connectKeys, forgetNewKey } from "./keys.js";
import * as api from "./operator-api.js";
import { drawLevers, onLever } from "./order-levers.js";
import { openEditor } from "./sale-editor.js";
import { showHistory } from "./sale-history.js";
import { StockChart } from "./stock-chart.js";

const POLL_MS = 2_000;
const STATES = ["PREPARED", "HELD", "CONFIRMING", "AWAITING_DEPOSIT", "CONFIRMED", "RELEASED", "EXPIRED", "REFUNDED"];

/** The PG's name of the payment method whose refund needs a bank account. */
const VIRTUAL_ACCOUNT = "가상계좌";

const $ = (id) => document.getElementById(id);
const stock = new StockChart($("stock"));
let figures = new Figures();
let sale = null;
let order = null;
let cursor = null;
let pollTimer = 0;
/** Number of order lists requested: a response to an older request is dropped. */
let listings = 0;

function notice(sentence) {
  $("notice").textContent = sentence;
  $("notice").hidden = !sentence;
  if (sentence) $("notice").focus();
}

/** Runs an operator's action, and shows its result. */
async function perform(action, done = "") {
  notice("");
  $("done").textContent = "";
  try {
    await action();
    // An action without a message keeps the message of another one.
    if (done) $("done").textContent = done;
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    // A role without a right keeps its session; any other 403 is a buyer's token.
    if (error.status === 401 || (error.status === 403 && !error.facts.role)) signOut();
    notice(error.facts.detail ? `${error.code}: ${error.facts.detail}` : error.code);
  }
}

const element = (name, text, properties = {}) =>
  Object.assign(document.createElement(name), { textContent: text, ...properties });

const clock = new Intl.DateTimeFormat(undefined, { dateStyle: "short", timeStyle: "medium" });
const exact = (at) => clock.format(new Date(at));

function drawSale() {
  $("status").textContent = [sale.visibility, sale.status.replace("_", " ")].filter((word) => word !== "public").join(", ");
  $("status").dataset.status = sale.status;
  $("window").textContent = `${moment(sale.opensAt)} to ${moment(sale.closesAt)}, holds of ${sale.holdSeconds} s`;
  $("pause").disabled = sale.status === "paused" || sale.status === "closed";
  $("resume").disabled = sale.status !== "paused";
  $("close").disabled = sale.status === "closed";
  $("archive").disabled = sale.status !== "closed";
  stock.show(sale.items);
}

function drawFigures(rows) {
  $("health").replaceChildren(
    ...rows.map(({ name, value, bad }) => {
      const one = document.createElement("div");
      one.className = bad ? "bad" : "";
      one.append(element("dt", name, { className: "quiet" }), element("dd", value));
      return one;
    }),
  );
}

/** Polls while the page is visible; a failed poll shows the error, and polling continues. */
async function poll() {
  clearTimeout(pollTimer);
  if (!api.operator.current || !sale) return;
  const { saleId } = sale;
  if (!document.hidden) {
    try {
      const [read, text] = await Promise.all([api.getSale(saleId), api.metrics()]);
      if (sale?.saleId !== saleId) return;
      sale = read;
      drawSale();
      drawFigures(figures.read(text, saleId));
      // A list in view does not move under the pointer; an empty one waits for its first order.
      if (!$("orders").childElementCount) await showOrders();
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      drawFigures([{ name: "No fresh figures", value: error.code, bad: true }]);
    }
  }
  pollTimer = setTimeout(poll, POLL_MS);
}

/** Shows the sale selected in the list: a response for an earlier selection is dropped. */
async function choose(saleId) {
  const isChosen = () => api.operator.current && $("sale").value === saleId;
  let read;
  try {
    read = await api.getSale(saleId);
  } catch (error) {
    // The page and its buttons still belong to the sale before.
    if (sale && isChosen()) $("sale").value = sale.saleId;
    throw error;
  }
  if (!isChosen()) return;
  sale = read;
  figures = new Figures();
  stock.clear();
  drawSale();
  // Not earlier: its buttons act on the sale that is shown.
  $("console").hidden = false;
  $("title").textContent = sale.name;
  $("report").hidden = $("order").hidden = true;
  history.replaceState(null, "", `/ops?${new URLSearchParams({ sale: saleId })}`);
  await Promise.all([poll(), showOrders(), showHistory(saleId)]);
}

async function showOrders({ more = false } = {}) {
  const filter = { saleId: sale.saleId, status: $("state").value, buyerId: $("buyer").value.trim(), limit: 20 };
  const listing = ++listings;
  const page = await api.listOrders({ ...filter, cursor: more ? cursor : null });
  if (listing !== listings) return;
  cursor = page.nextCursor;
  const rows = page.orders.map(orderRow);
  if (more) $("orders").append(...rows);
  else $("orders").replaceChildren(...rows);
  $("no-orders").hidden = $("orders").childElementCount > 0;
  $("more").hidden = !cursor;
}

function orderRow({ orderId, status, buyerId, items, amount, currency, updatedAt }) {
  const row = document.createElement("tr");
  const first = document.createElement("td");
  const open = element("button", `…${orderId.slice(-8)}`, { type: "button", title: orderId });
  open.addEventListener("click", () => perform(() => showOrder(orderId)));
  first.append(open);
  const lines = items.map(({ sku, quantity }) => `${sku} × ${quantity}`).join(", ");
  const cells = [status, buyerId, lines, money(amount, currency), exact(updatedAt)];
  row.append(first, ...cells.map((text) => element("td", text)));
  return row;
}

async function showOrder(orderId) {
  order = await api.getOrder(orderId);
  $("order-title").textContent = `Order ${order.orderId}`;
  const key = order.paymentKeyLast4 ? `, payment …${order.paymentKeyLast4}` : "";
  $("order-now").textContent = `${order.status}, ${money(order.amount, order.currency)}, buyer ${order.buyerId}${key}`;
  $("order-next").textContent = order.next;
  drawAccount();
  $("refund").hidden = order.status !== "CONFIRMED";
  drawLevers(order);
  $("history").replaceChildren(...order.history.map(historyLine));
  $("order").hidden = false;
  $("order").focus();
}

/** The account that awaits a deposit, and the one that receives a pending refund. */
function drawAccount() {
  const { virtualAccount: account, refund } = order;
  $("order-account").hidden = !account;
  $("order-account").textContent = account
    ? `Waits for a deposit to ${account.bankEnglish} (${account.bank}) ${account.accountNumber}, ${account.holderName}, until ${exact(account.dueAt)}`
    : "";
  const open = refund && refund.status !== "done";
  $("order-refund").hidden = !open;
  $("order-refund").textContent = open ? refundWords(refund) : "";
}

function refundWords({ status, operator, reason, restock, refundReceiveAccount: to, providerCode }) {
  const back = to ? `, to bank ${to.bank}, account ${to.accountNumber}, ${to.holderName}` : "";
  const pieces = restock ? "pieces back on sale" : "pieces kept out of the sale";
  const outcome = providerCode ? `; the PG answered ${providerCode}` : "";
  return `Refund ${status}: ${operator}, ${reason}, ${pieces}${back}${outcome}`;
}

function historyLine({ at, kind, what, facts: { explanation = "", ...facts } }) {
  const line = document.createElement("li");
  const filled = Object.entries(facts).filter(([, value]) => value !== "");
  const details = filled.map(([name, value]) => `${name} ${JSON.stringify(value)}`).join(" · ");
  line.append(element("strong", `${exact(at)} ${kind}: ${what}`));
  if (explanation) line.append(element("div", explanation));
  line.append(element("div", details, { className: "quiet" }));
  return line;
}

async function runAudit() {
  const { saleId } = sale;
  const report = await api.audit(saleId);
  if (sale?.saleId !== saleId) return;
  const lag = report.lag ? `; SQL is ${report.lag} events behind` : "";
  $("report-title").textContent = report.ok ? `Audit: everything adds up${lag}` : "Audit: something is wrong";
  const lines = report.problems.length
    ? report.problems
    : report.skus.map((one) => `${one.sku}: ${one.total} = ${one.available} available + ${one.held} held (${one.confirming} being paid) + ${one.sold} sold`);
  $("report-lines").replaceChildren(...lines.map((line) => element("li", line)));
  $("report").hidden = false;
  $("report").focus();
}

/** Shows the result of a change, unless the page shows another sale by then. */
function changed(after) {
  if (sale?.saleId !== after.saleId) return;
  sale = after;
  drawSale();
  // SQL has the change a moment later.
  setTimeout(() => perform(() => showHistory(after.saleId)), POLL_MS);
}

async function changeState(verb, title) {
  const { saleId, name } = sale;
  const answer = await openDialog({ title: `${title} ${name}?`, text: EFFECTS[verb] });
  if (!answer) return;
  await perform(
    async () => changed(await api.changeState(saleId, verb, answer.reason)),
    `${name} is ${verb === "resume" ? "open" : `${verb}d`}.`,
  );
}

const EFFECTS = {
  pause: "New holds are refused. Existing holds and payments continue.",
  resume: "New holds are accepted again.",
  close: "This cannot be undone. Payments that have begun continue.",
  archive: "The sale leaves the lists and Redis. Its orders stay, and can be refunded.",
};

/** Archiving takes the sale off the lists, so the console shows another one. */
async function archive() {
  const { saleId, name } = sale;
  const answer = await openDialog({ title: `Archive ${name}?`, text: EFFECTS.archive });
  if (!answer) return;
  await perform(async () => {
    await api.changeState(saleId, "archive", answer.reason);
    await showSales({ archived: saleId });
  }, `${name} is archived.`);
}

function newSale() {
  openEditor({ title: "New sale", onSave: (saleId, definition) => put(saleId, definition) });
}

function copy() {
  const { opensAt: _opensAt, closesAt: _closesAt, saleId: _saleId, ...settings } = sale;
  openEditor({ title: `Copy of ${sale.name}`, sale: settings, onSave: (saleId, definition) => put(saleId, definition) });
}

async function edit() {
  await perform(async () => {
    const { sale: read, etag } = await api.getSaleToEdit(sale.saleId);
    openEditor({
      title: `Edit ${read.name}`,
      sale: read,
      fixed: true,
      onSave: (saleId, definition) => put(saleId, definition, etag),
    });
  });
}

async function put(saleId, definition, etag = null) {
  const saved = await api.putSale(saleId, definition, etag);
  await perform(() => showSales({ named: saleId }), `${saved.name} is ${etag ? "changed" : "created"}.`);
}

async function restock() {
  const { saleId, name, items } = sale;
  const answer = await openDialog({ title: `Restock ${name}`, skus: items, delta: true });
  if (!answer) return;
  const { sku, delta, reason, key } = answer;
  await perform(
    async () => changed(await api.restock(saleId, { sku, delta, reason }, key)),
    `${sku}: ${delta > 0 ? `${delta} pieces added` : `${-delta} pieces withdrawn`}.`,
  );
}

async function refund() {
  const { orderId, amount, currency, paymentMethod } = order;
  const answer = await openDialog({
    title: `Refund ${money(amount, currency)}?`,
    text: `Order ${orderId}, in full.`,
    restock: true,
    account: paymentMethod === VIRTUAL_ACCOUNT,
  });
  if (!answer) return;
  const { reason, restock: back, account, key } = answer;
  const request = { reason, restock: back, ...(account && { refundReceiveAccount: account }) };
  await perform(() => sendRefund(orderId, request, key), "The refund has begun.");
}

async function sendRefund(orderId, request, key) {
  let after;
  try {
    after = await api.refund(orderId, request, key);
  } catch (error) {
    // Another refund may be pending or done: the order shows it below the refusal.
    if (error.status === 409) await showOrder(orderId);
    throw error;
  }
  await Promise.all([showOrder(orderId), showOrders(), poll()]);
  $("order-now").textContent = `${after.status}${after.code ? ` (${after.code}: it continues by itself)` : ""}`;
  // A pending one may be corrected; SQL may lag behind one that has completed.
  $("refund").hidden = !after.code;
}

async function changeOrder(verb, title, text) {
  const { orderId } = order;
  const answer = await openDialog({ title, text });
  if (!answer) return;
  await perform(async () => {
    const after = await api.changeOrder(orderId, verb, answer.reason);
    await Promise.all([showOrder(orderId), showOrders(), poll()]);
    $("done").textContent = `Order …${orderId.slice(-8)} is ${after.status}.`;
  });
}

async function signIn() {
  const { name, role, rights } = await api.identity();
  document.body.dataset.rights = rights.join(" ");
  $("sign-in").hidden = true;
  $("session").hidden = $("sales-actions").hidden = $("keys").hidden = false;
  $("operator").textContent = `${name ?? (api.operator.current.name || "operator")} (${role})`;
  await showSales({ named: new URLSearchParams(location.search).get("sale") });
}

/** Lists the sales without an archived one, and shows the named one, or the first that is open. */
async function showSales({ named = null, archived = null } = {}) {
  // Each process keeps the list for a second, so it may lack a new sale and still have an archived one.
  const sales = (await api.listSales()).filter(({ saleId }) => saleId !== archived);
  if (named && !sales.some(({ saleId }) => saleId === named)) sales.push(...(await existing(named)));
  $("sale").replaceChildren(...sales.map(({ saleId, name }) => element("option", `${name} (${saleId})`, { value: saleId })));
  if (!sales.length) {
    sale = null;
    $("console").hidden = true;
    $("title").textContent = "There is no sale yet";
    return;
  }
  const first = sales.find(({ saleId }) => saleId === named) ?? sales.find(({ status }) => status === "open") ?? sales[0];
  $("sale").value = first.saleId;
  await choose(first.saleId);
}

/** The sale of an id in a list, or an empty list. */
async function existing(saleId) {
  try {
    return [await api.getSale(saleId)];
  } catch (error) {
    if (error instanceof Refusal && error.status === 404) return [];
    throw error;
  }
}

function signOut() {
  api.operator.signOut();
  clearTimeout(pollTimer);
  sale = null;
  document.body.dataset.rights = "";
  forgetNewKey();
  $("key-rows").replaceChildren();
  $("keys").open = false;
  $("console").hidden = $("session").hidden = $("sales-actions").hidden = $("keys").hidden = true;
  $("sign-in").hidden = false;
  $("title").textContent = "Sign in";
}

$("state").append(...STATES.map((state) => element("option", state)));
$("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  api.operator.signIn($("key").value.trim(), $("name").value.trim());
  $("key").value = "";
  perform(signIn);
});
$("sign-out").addEventListener("click", signOut);
$("sale").addEventListener("change", () => perform(() => choose($("sale").value)));
$("filter").addEventListener("submit", (event) => {
  event.preventDefault();
  perform(() => showOrders());
});
$("more").addEventListener("click", () => perform(() => showOrders({ more: true })));
$("pause").addEventListener("click", () => changeState("pause", "Pause"));
$("resume").addEventListener("click", () => changeState("resume", "Resume"));
$("close").addEventListener("click", () => changeState("close", "Close"));
$("archive").addEventListener("click", archive);
$("new-sale").addEventListener("click", newSale);
$("edit").addEventListener("click", edit);
$("copy").addEventListener("click", copy);
$("restock").addEventListener("click", restock);
$("audit").addEventListener("click", () => perform(runAudit));
$("refund").addEventListener("click", refund);
$("more-changes").addEventListener("click", () => perform(() => showHistory(sale.saleId, { more: true })));
onLever(changeOrder);
connectKeys(perform);
// Disabled until now: a submission without this script would reload the page.
$("sign-in").querySelector("button").disabled = false;
if (api.operator.current) perform(signIn);
