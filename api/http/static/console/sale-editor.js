// Editor of a sale's definition: new, changed, or copied from another sale.

import { Refusal } from "../reservation.js";

const $ = (id) => document.getElementById(id);
/** The definition of a new sale. */
const NEW = {
  name: "",
  currency: "KRW",
  holdSeconds: 300,
  holdPolicy: "prepare",
  virtualAccounts: false,
  requireAdmission: false,
  visibility: "public",
  description: "",
  items: [{ sku: "", name: "", price: "", total: "", limitPerBuyer: 1 }],
};
const CHECKS = ["virtualAccounts", "requireAdmission"];
/** Settings that an update may not change. */
const FIXED = ["saleId", "currency", "holdPolicy"];

let save = null;
let base = null;

/** Digits behind the decimal point of a currency; a currency that has not been typed has none. */
function decimals(currency) {
  try {
    return new Intl.NumberFormat("en", { style: "currency", currency }).resolvedOptions().maximumFractionDigits;
  } catch {
    return 0;
  }
}

/** An instant as the local date and time of a `datetime-local` input, to the second. */
function localTime(at) {
  const date = new Date(at);
  return new Date(date.getTime() - date.getTimezoneOffset() * 60_000).toISOString().slice(0, 19);
}

/** The instant of an input. One that was not changed keeps its fraction of a second. */
function instant(input, before) {
  return before && localTime(before) === input.value.padEnd(19, ":00") ? before : new Date(input.value).toISOString();
}

function addItem({ sku, name, price, total, limitPerBuyer, description = "", imageUrl = "" }, { currency }) {
  const row = $("editor-item").content.firstElementChild.cloneNode(true);
  const field = (one) => row.querySelector(`[name=${one}]`);
  field("sku").value = sku;
  field("itemName").value = name;
  field("price").value = price === "" ? "" : price / 10 ** decimals(currency);
  field("total").value = total;
  field("limit").value = limitPerBuyer;
  field("itemDescription").value = description;
  field("imageUrl").value = imageUrl;
  row.querySelector("button").addEventListener("click", () => {
    row.remove();
    allowRemoval();
  });
  $("editor-items").append(row);
  allowRemoval();
  return row;
}

/** A sale has at least one item. */
function allowRemoval() {
  const buttons = $("editor-items").querySelectorAll("button");
  for (const button of buttons) button.disabled = buttons.length === 1;
}

function allowDecimals() {
  const { currency } = $("editor-form").elements;
  for (const price of $("editor-items").querySelectorAll("[name=price]")) price.step = 10 ** -decimals(currency.value);
}

function itemOf(row, currency) {
  const value = (one) => row.querySelector(`[name=${one}]`).value;
  return {
    sku: value("sku").trim(),
    name: value("itemName").trim(),
    price: Math.round(Number(value("price")) * 10 ** decimals(currency)),
    total: Number(value("total")),
    limitPerBuyer: Number(value("limit")),
    description: value("itemDescription").trim(),
    imageUrl: value("imageUrl").trim(),
  };
}

function definition() {
  const { elements } = $("editor-form");
  const currency = elements.currency.value;
  return {
    name: elements.name.value.trim(),
    currency,
    opensAt: instant(elements.opensAt, base.opensAt),
    closesAt: instant(elements.closesAt, base.closesAt),
    holdSeconds: Number(elements.holdSeconds.value),
    holdPolicy: elements.holdPolicy.value,
    visibility: elements.visibility.value,
    description: elements.description.value.trim(),
    ...Object.fromEntries(CHECKS.map((name) => [name, elements[name].checked])),
    items: [...$("editor-items").children].map((row) => itemOf(row, currency)),
  };
}

function refuse(sentence) {
  $("editor-error").textContent = sentence;
  $("editor-error").hidden = !sentence;
  if (sentence) $("editor-error").focus();
}

function refusalOf(refusal) {
  if (refusal.code === "precondition_failed") return "The sale was changed meanwhile. Close this form and open it again.";
  if (refusal.code === "precondition_required") return "A sale with this id exists.";
  return refusal.facts.detail ? `${refusal.code}: ${refusal.facts.detail}` : refusal.code;
}

/**
 * Opens the editor. `fixed`: the sale exists, so its id, currency and policy stay. `onSave` gets
 * the id and the definition; the form stays open, with its input, if it throws a refusal.
 */
export function openEditor({ title, sale = NEW, fixed = false, onSave }) {
  const { elements } = $("editor-form");
  $("editor-form").reset();
  refuse("");
  $("editor-title").textContent = title;
  $("editor-zone").textContent = `Times are in the time zone of this computer (${Intl.DateTimeFormat().resolvedOptions().timeZone}).`;
  for (const name of ["saleId", "name", "currency", "holdSeconds", "holdPolicy", "visibility", "description"]) elements[name].value = sale[name] ?? "";
  for (const name of CHECKS) elements[name].checked = sale[name];
  for (const name of ["opensAt", "closesAt"]) elements[name].value = sale[name] ? localTime(sale[name]) : "";
  for (const name of FIXED) elements[name].disabled = fixed;
  // A published sale cannot become a draft.
  elements.visibility.querySelector("[value=draft]").disabled = fixed && sale.visibility !== "draft";
  $("editor-items").replaceChildren();
  for (const one of sale.items) addItem(one, sale);
  allowDecimals();
  base = sale;
  save = onSave;
  $("editor").showModal();
}

$("editor-add").addEventListener("click", () => {
  const row = addItem(NEW.items[0], NEW);
  allowDecimals();
  row.querySelector("input").focus();
});
$("editor-cancel").addEventListener("click", () => $("editor").close());
$("editor-form").elements.currency.addEventListener("change", allowDecimals);
$("editor-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  refuse("");
  $("editor-save").disabled = true;
  try {
    await save($("editor-form").elements.saleId.value, definition());
    $("editor").close();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    refuse(refusalOf(error));
  } finally {
    $("editor-save").disabled = false;
  }
});
