// The changes of a sale by operators: who, when and why.

import * as api from "./operator-api.js";

const $ = (id) => document.getElementById(id);
const element = (name, text, properties = {}) =>
  Object.assign(document.createElement(name), { textContent: text, ...properties });
const clock = new Intl.DateTimeFormat(undefined, { dateStyle: "short", timeStyle: "medium" });

const NAMES = {
  sale_put: "settings",
  sale_switched: "state",
  restocked: "stock",
  rebuilt: "rebuilt",
  archive: "archived",
  retired: "retired",
  purged: "purged",
};

let shown = "";
let cursor = null;

function line({ at, what, operator, reason, facts }) {
  const item = document.createElement("li");
  const who = operator ? ` by ${operator}` : "";
  item.append(element("strong", `${clock.format(new Date(at))} ${NAMES[what] ?? what}${who}`));
  if (reason) item.append(element("div", reason));
  item.append(element("div", details(what, facts), { className: "quiet" }));
  return item;
}

function details(what, { status, sku, delta, items = [], version, total }) {
  if (what === "sale_switched") return status;
  if (what === "restocked") return `${sku}: ${delta > 0 ? "+" : ""}${delta}, total ${total}`;
  if (what !== "sale_put") return "";
  return `version ${version}: ${items.map((one) => `${one.sku} ${one.total}`).join(", ")}`;
}

/** Shows the newest changes of a sale, or more of them. A response for another sale is dropped. */
export async function showHistory(saleId, { more = false } = {}) {
  if (!more) shown = saleId;
  const page = await api.saleHistory(saleId, more ? cursor : null);
  if (shown !== saleId) return;
  cursor = page.nextCursor;
  const lines = page.changes.map(line);
  if (more) $("changes").append(...lines);
  else $("changes").replaceChildren(...lines);
  $("more-changes").hidden = !cursor;
}
