// Dialog of a change: the operator's confirmation, a reason, and the change's fields.

import { newKey } from "../reservation.js";

const $ = (id) => document.getElementById(id);
/** The members of an account, as the service calls them. */
const ACCOUNT = ["bank", "accountNumber", "holderName"];

/**
 * The operator's input, or null. One dialog has one idempotency `key`, so that a repeat of the
 * call that follows takes effect once.
 */
export function openDialog({ title, text = "", skus = null, delta = false, restock = false, account = false }) {
  const form = $("ask-form");
  form.reset();
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-text").hidden = !text;
  $("ask-sku").hidden = !skus;
  $("ask-delta").hidden = !delta;
  form.elements.delta.required = delta;
  $("ask-restock").hidden = !restock;
  $("ask-account").hidden = !account;
  for (const name of ACCOUNT) form.elements[name].required = account;
  form.elements.sku.replaceChildren(...(skus ?? []).map(({ sku, name }) => new Option(`${name} (${sku})`, sku)));
  const dialog = $("ask");
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((answer) => {
    dialog.addEventListener(
      "close",
      () => {
        if (dialog.returnValue !== "yes") return answer(null);
        const { sku, delta: pieces, restock: back, reason } = form.elements;
        answer({
          sku: sku.value,
          delta: Number(pieces.value),
          restock: back.checked,
          account: account && Object.fromEntries(ACCOUNT.map((name) => [name, form.elements[name].value.trim()])),
          reason: reason.value.trim(),
          key: newKey(),
        });
      },
      { once: true },
    );
  });
}
