// The basket: the items with the stock left of each, the chosen quantities, and their price.

import { tab } from "../common/storage.js";
import { money, number, t } from "../common/i18n.js";

/** Stock that falls to this is announced to screen readers. */
const FEW = 10;

const place = (saleId) => `basket.${saleId}`;

/** Clears the basket of a paid order, so that a reload does not offer it again. */
export function forgetBasket(saleId) {
  tab.forget(place(saleId));
}

export class Basket {
  #rows = new Map();
  #sale;
  #list;
  #template;
  #say;
  #onChange;

  constructor({ list, template, say, onChange }) {
    this.#list = list;
    this.#template = template;
    this.#say = say;
    this.#onChange = onChange;
  }

  /** Draws the sale's items; the buyer's choice, from before a reload too, stays. */
  show(sale) {
    this.#sale = sale;
    // A SKU may have the name of a member of every object, such as `constructor`.
    const chosen = new Map(Object.entries(tab.get(place(sale.saleId)) ?? this.#defaultChoice(sale)));
    const skus = new Set(sale.items.map((item) => item.sku));
    for (const [sku, row] of this.#rows) {
      if (skus.has(sku)) continue;
      row.element.remove();
      this.#rows.delete(sku);
    }
    for (const item of sale.items) {
      const row = this.#rows.get(item.sku) ?? this.#newRow(item);
      row.item = item;
      row.quantity = Math.min(chosen.get(item.sku) ?? 0, item.limitPerBuyer);
      this.#list.append(row.element);
      this.#draw(row);
    }
    this.#onChange();
  }

  /** The default basket: one unit, if the sale has a single item. */
  #defaultChoice(sale) {
    return sale.items.length === 1 ? { [sale.items[0].sku]: 1 } : {};
  }

  /** A change of the live stock. */
  stock({ sku, available, held, sold }) {
    const row = this.#rows.get(sku);
    if (!row) return;
    const before = row.item.available;
    row.item = { ...row.item, available, held, sold, total: available + held + sold };
    this.#draw(row);
    this.#announce(row.item, before);
    this.#onChange();
  }

  #announce({ name, available }, before) {
    if (before > 0 && available === 0) this.#say(t("say.soldOut", { name }));
    if (before === 0 && available > 0) this.#say(t("say.back", { name }));
    if (before > FEW && available > 0 && available <= FEW) {
      this.#say(t("say.few", { name, count: available }));
    }
  }

  get chosen() {
    return [...this.#rows.values()].filter((row) => row.quantity > 0);
  }

  /** The lines in the form of prepare's body. */
  get lines() {
    return this.chosen.map(({ item, quantity }) => ({ sku: item.sku, quantity }));
  }

  get amount() {
    return this.chosen.reduce((sum, { item, quantity }) => sum + item.price * quantity, 0);
  }

  /** Whether a chosen item is sold out for good: no unit is held, so none can return. */
  get soldOut() {
    return this.chosen.some(({ item }) => item.available === 0 && item.held === 0);
  }

  nameOf(sku) {
    return this.#rows.get(sku)?.item.name ?? sku;
  }

  #store() {
    const chosen = Object.fromEntries(this.chosen.map(({ item, quantity }) => [item.sku, quantity]));
    tab.set(place(this.#sale.saleId), chosen);
  }

  #newRow(item) {
    const element = this.#template.content.cloneNode(true).firstElementChild;
    const row = { item, quantity: 0, element };
    element.querySelector(".less").addEventListener("click", () => this.#step(row, -1));
    element.querySelector(".more").addEventListener("click", () => this.#step(row, 1));
    this.#rows.set(item.sku, row);
    return row;
  }

  #step(row, by) {
    row.quantity = Math.min(Math.max(0, row.quantity + by), row.item.limitPerBuyer);
    this.#draw(row);
    this.#store();
    this.#onChange();
    this.#say(t("say.total", { amount: money(this.amount, this.#sale.currency) }));
  }

  #draw({ item, quantity, element }) {
    const find = (selector) => element.querySelector(selector);
    const { name } = item;
    element.dataset.sku = item.sku;
    element.classList.toggle("gone", item.available === 0);
    find("h2").textContent = name;
    find(".text").textContent = item.description ?? "";
    find(".text").hidden = !item.description;
    show(find(".picture"), item.imageUrl);
    find(".price").textContent = money(item.price, this.#sale.currency);
    find(".words").textContent = leftWords(item);
    find(".meter span").style.inlineSize = `${item.total ? (100 * item.available) / item.total : 0}%`;
    find(".limit").textContent = t("limit", { count: number(item.limitPerBuyer) });
    find(".stepper").setAttribute("aria-label", t("quantityOf", { name }));
    find("output").textContent = number(quantity);
    find(".less").setAttribute("aria-label", t("oneLess", { name }));
    find(".more").setAttribute("aria-label", t("oneMore", { name }));
    // Not `disabled`: at the last step the element would lose the focus.
    find(".less").setAttribute("aria-disabled", String(quantity === 0));
    find(".more").setAttribute("aria-disabled", String(quantity >= item.limitPerBuyer));
  }
}

/** The name beside the picture says what it shows, so the picture has no text of its own. */
function show(picture, address) {
  if (address && picture.getAttribute("src") !== address) {
    picture.onerror = () => (picture.hidden = true);
    picture.src = address;
    picture.hidden = false;
  }
  if (!address) picture.hidden = true;
}

function leftWords({ available, held, total }) {
  if (available > 0) return t("leftOf", { count: number(available), total: number(total) });
  return t(held > 0 ? "allHeld" : "soldOut");
}
