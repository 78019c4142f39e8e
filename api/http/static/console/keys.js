// The owner's page of operators' keys: create, list and revoke.

import { openDialog } from "./change-dialog.js";
import * as api from "./operator-api.js";

const $ = (id) => document.getElementById(id);
const element = (name, text, properties = {}) =>
  Object.assign(document.createElement(name), { textContent: text, ...properties });
const clock = new Intl.DateTimeFormat(undefined, { dateStyle: "short", timeStyle: "short" });
const exact = (at) => clock.format(new Date(at));

let cursor = null;

function row(key, perform) {
  const { name, role, hint, createdAt, createdBy, reason, revokedAt, revokedBy, revokedReason } = key;
  const line = document.createElement("tr");
  const why = (text) => (text ? `: ${text}` : "");
  const ended = revokedAt ? `${exact(revokedAt)} by ${revokedBy}${why(revokedReason)}` : "";
  const cells = [name, role, `…${hint}`, `${exact(createdAt)} by ${createdBy}${why(reason)}`];
  line.append(...cells.map((text) => element("td", text)));
  const last = element("td", ended);
  if (!revokedAt) {
    const revoke = element("button", "Revoke", { type: "button", className: "plain" });
    revoke.setAttribute("aria-label", `Revoke the key …${hint} of ${name}`);
    revoke.addEventListener("click", () => askToRevoke(key, perform));
    last.append(revoke);
  }
  line.append(last);
  return line;
}

async function askToRevoke({ keyId, name, hint }, perform) {
  const answer = await openDialog({
    title: `Revoke the key …${hint} of ${name}?`,
    text: "Every process refuses it within five seconds. This cannot be undone.",
  });
  if (!answer) return;
  await perform(async () => {
    await api.revokeKey(keyId, answer.reason);
    await showKeys(perform);
  }, `The key of ${name} is revoked.`);
}

/** Shows the newest keys, or more of them. */
async function showKeys(perform, { more = false } = {}) {
  const page = await api.listKeys(more ? cursor : null);
  cursor = page.nextCursor;
  const rows = page.keys.map((key) => row(key, perform));
  if (more) $("key-rows").append(...rows);
  else $("key-rows").replaceChildren(...rows);
  $("more-keys").hidden = !cursor;
}

/** Connects the page; `perform(action, done)` runs a call and shows its refusal. */
export function connectKeys(perform) {
  const form = $("new-key");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const { name, role, reason } = Object.fromEntries(new FormData(form));
    perform(async () => {
      const { key } = await api.createKey({ name: name.trim(), role, reason: reason.trim() });
      form.reset();
      $("made-key").hidden = false;
      $("made-key-text").textContent = key;
      await showKeys(perform);
    }, `The key of ${name.trim()} is created.`);
  });
  $("more-keys").addEventListener("click", () => perform(() => showKeys(perform, { more: true })));
  $("keys").addEventListener("toggle", () => {
    forgetNewKey();
    if ($("keys").open) perform(() => showKeys(perform));
  });
}

/** Removes the key that was just created from the page. */
export function forgetNewKey() {
  $("made-key").hidden = true;
  $("made-key-text").textContent = "";
}
