// The hold: its items, countdown, payment and release.

import { Refusal } from "../reservation.js";
import { money, remaining, t } from "../common/i18n.js";
import { dropWidgets, needsMethod, pay } from "./payment.js";
import { dropToken, keepToken, paymentBegins } from "./release-on-leave.js";
import { shop } from "./session.js";

const $ = (id) => document.getElementById(id);

/** Seconds left at which the countdown is announced to screen readers. */
const ANNOUNCED_AT = new Set([300, 120, 60, 30, 10]);
/** Poll interval for a hold that is over by our clock but not yet by the service's. */
const POLL_MS = 1_000;

export class Hold {
  #current = null;
  #busy = false;
  #pollAt = 0;
  #page;

  /** @param page callbacks: say, notice(sentence), nameOf(sku), takesAccounts(), refused(refusal), over(), ended(sentence) */
  constructor(page) {
    this.#page = page;
    $("pay").addEventListener("click", () => this.#pay());
    $("give-back").addEventListener("click", () => this.#release());
  }

  get current() {
    return this.#current;
  }

  /** Shows a live reservation, or none. Only prepare's response carries the token. */
  show(reservation) {
    if (reservation?.orderId !== this.#current?.orderId) {
      this.#pollAt = 0;
      dropWidgets();
    }
    this.#current = reservation;
    this.#busy = false;
    $("hold").hidden = !reservation;
    if (!reservation) return dropToken();
    if (reservation.token) keepToken(reservation.orderId, reservation.token);
    const { status, items, amount, currency } = reservation;
    const held = status === "HELD";
    $("hold-title").textContent = t(held ? "holdTitle" : "preparedTitle");
    $("hold-note").textContent = t(held ? "holdStays" : "policySuccess");
    $("hold-lines").replaceChildren(...items.map((item) => this.#line(item, currency)));
    $("pay").textContent = t("pay", { amount: money(amount, currency) });
    $("pay-how").hidden = !this.#page.takesAccounts() || !needsMethod(reservation);
    this.#enable(true);
    this.tick();
  }

  focus() {
    $("hold-title").focus();
  }

  #line({ sku, quantity, price }, currency) {
    const line = document.createElement("li");
    const name = document.createElement("span");
    const cost = document.createElement("span");
    name.textContent = `${this.#page.nameOf(sku)} ×\u00a0${quantity}`;
    cost.textContent = money(price * quantity, currency);
    line.append(name, cost);
    return line;
  }

  /** The countdown; at its end the page reads the outcome from the service. */
  tick() {
    if (!this.#current) return;
    const left = Date.parse(this.#current.expiresAt) - shop.now();
    const shown = remaining(left);
    const clock = $("hold-left").querySelector("strong");
    if (clock.textContent !== shown) {
      clock.textContent = shown;
      const seconds = Math.ceil(left / 1000);
      if (ANNOUNCED_AT.has(seconds)) this.#page.say(t("say.timeLeft", { time: spoken(seconds) }));
    }
    $("hold").classList.toggle("short", left < 60_000);
    if (left <= 0 && !this.#busy && performance.now() >= this.#pollAt) this.#poll();
  }

  async #poll() {
    // Prevents a second call while this one is in progress.
    this.#pollAt = Infinity;
    try {
      await this.#page.over();
    } finally {
      this.#pollAt = performance.now() + POLL_MS * (1 + Math.random());
    }
  }

  get #method() {
    if ($("pay-how").hidden) return "CARD";
    return $("pay-how").querySelector(":checked").value;
  }

  #enable(possible) {
    $("pay-how").disabled = !possible;
    $("pay").disabled = !possible;
    $("give-back").disabled = !possible;
  }

  async #pay() {
    const reservation = this.#current;
    paymentBegins(reservation.orderId);
    this.#enable(false);
    $("pay").textContent = t("paying");
    try {
      await pay(reservation, this.#method);
      // With a widget key the first press draws the payment methods; the second leaves the page.
      if (!reservation.payment.checkoutUrl) this.show(reservation);
    } catch (error) {
      // The PG's script was blocked, or it refused: its message is for the shop's developer.
      console.warn("payment page:", error);
      this.show(reservation);
      this.#page.notice(t("error.payment_page"));
    }
  }

  async #release() {
    const { orderId } = this.#current;
    this.#busy = true;
    this.#enable(false);
    try {
      await shop.release({ orderId });
      this.#page.ended(t("released"));
    } catch (refusal) {
      if (!(refusal instanceof Refusal)) throw refusal;
      this.#busy = false;
      this.#enable(true);
      this.#page.refused(refusal);
    }
  }
}

function spoken(seconds) {
  if (seconds < 60) return t("seconds", { count: seconds });
  return remaining(seconds * 1000);
}
