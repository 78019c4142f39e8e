// The list of sales.

import { listSales } from "./api.js";
// A buyer with a hold may leave the shop from here as well.
import "./release-on-leave.js";
import { moment, sorry, t, translatePage } from "../shared/i18n.js";

const $ = (id) => document.getElementById(id);

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
  shown.querySelector(".what").textContent = sale.items.map((item) => item.name).join(" · ");
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

async function show() {
  $("notice").hidden = true;
  try {
    const sales = await listSales();
    $("sales").replaceChildren(...sales.sort(byStatus).map(card));
    $("none").hidden = sales.length > 0;
  } catch (refusal) {
    $("notice").textContent = sorry(refusal, { reading: true });
    $("notice").hidden = false;
  }
  $("loading").hidden = true;
}

translatePage(t("sales"));
show();
addEventListener("pageshow", (event) => event.persisted && show());
