// The list of sales.

import { moment, refusalText, t, translatePage } from "../common/i18n.js";
// A buyer with a hold may leave the shop from here as well.
import "./release-on-leave.js";
import { shop } from "./session.js";

const $ = (id) => document.getElementById(id);

/** The latest past sales that the page lists. */
const PAST_MAX = 50;
/** Open sales first, then upcoming, then past. */
const ORDER = ["open", "paused", "scheduled", "sold_out", "closed"];

function card(sale) {
  const shown = $("sale").content.cloneNode(true);
  const pill = shown.querySelector(".pill");
  pill.textContent = t(`status.${sale.status}`);
  pill.dataset.status = sale.status;
  shown.querySelector("a").href = `/sales/${encodeURIComponent(sale.saleId)}`;
  shown.querySelector("h2").textContent = sale.name;
  shown.querySelector(".when").textContent = when(sale);
  shown.querySelector(".names").textContent = sale.items.map((item) => item.name).join(" · ");
  return shown;
}

function when(sale) {
  if (sale.status === "scheduled") return t("opensAt", { time: moment(sale.opensAt) });
  const word = sale.status === "closed" ? "closedAt" : "closesAt";
  return t(word, { time: moment(sale.closesAt) });
}

function byStatus(one, other) {
  return ORDER.indexOf(one.status) - ORDER.indexOf(other.status);
}

async function listSales() {
  const sales = [];
  let past = 0;
  for await (const sale of shop.sales()) {
    if (sale.status === "closed" && ++past > PAST_MAX) break;
    sales.push(sale);
  }
  return sales;
}

async function show() {
  $("notice").hidden = true;
  try {
    const sales = await listSales();
    $("sales").replaceChildren(...sales.sort(byStatus).map(card));
    $("none").hidden = sales.length > 0;
  } catch (refusal) {
    $("notice").textContent = refusalText(refusal, { reading: true });
    $("notice").hidden = false;
  }
  $("loading").hidden = true;
}

translatePage(t("sales"));
show();
addEventListener("pageshow", (event) => event.persisted && show());
