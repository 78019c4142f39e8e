// Opens the PG's page: by its URL, or through the PG's own script if the shop has real keys.

const SDK = "https://js.tosspayments.com/v2/standard";

/** A deposit may come this long after the order; its units are held meanwhile. */
const DEPOSIT_HOURS = 24;

/** Client keys of the product that draws its payment methods into our page. */
const WIDGET_KEY = /^(test|live)_gck_/;

function checkoutAddress(reservation) {
  const { checkoutUrl, clientKey, customerKey, successUrl, failUrl } = reservation.payment;
  const { orderId, orderName, amount, currency } = reservation;
  const address = new URL(checkoutUrl);
  const parameters = { clientKey, customerKey, orderId, orderName, amount, currency, successUrl, failUrl };
  for (const [name, value] of Object.entries(parameters)) address.searchParams.set(name, value);
  return address.href;
}

function loadScript(address) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = address;
    script.addEventListener("load", resolve);
    script.addEventListener("error", () => reject(new Error(`${address} did not load`)));
    document.head.append(script);
  });
}

let drawn = null;

let removal = Promise.resolve();

/** The PG's SDK renders into an empty element only: remove the widgets of another order first. */
export function dropWidgets() {
  const parts = drawn?.parts ?? [];
  drawn = null;
  removal = removal
    .then(() => Promise.all(parts.map((part) => part.destroy())))
    .catch((error) => console.warn("payment widgets:", error));
  return removal;
}

/** With a widget key the buyer first chooses a method in our page, and presses Pay once more. */
async function drawWidgets(toss, { orderId, amount, currency, payment }) {
  await dropWidgets();
  const widgets = toss.widgets({ customerKey: payment.customerKey });
  await widgets.setAmount({ currency, value: amount });
  const parts = [await widgets.renderPaymentMethods({ selector: "#pg-methods" })];
  // Partly drawn widgets count as not drawn: the next press begins anew.
  drawn = { orderId: null, widgets, parts };
  parts.push(await widgets.renderAgreement({ selector: "#pg-agreement" }));
  drawn = { orderId, widgets, parts };
}

/**
 * Whether our page shows the payment methods: the PG's own page and its widgets have a list of
 * methods, while a key of the single API opens one method's window.
 */
export const needsMethod = ({ payment: { checkoutUrl, clientKey } }) =>
  !checkoutUrl && !WIDGET_KEY.test(clientKey);

async function payBySdk(reservation, method) {
  const { orderId, orderName, amount, currency, payment } = reservation;
  if (!window.TossPayments) await loadScript(SDK);
  const toss = window.TossPayments(payment.clientKey);
  const request = {
    orderId,
    orderName,
    successUrl: payment.successUrl,
    failUrl: payment.failUrl,
    // Only a redirect works on phones as well.
    windowTarget: "self",
  };
  if (WIDGET_KEY.test(payment.clientKey)) {
    if (drawn?.orderId !== orderId) return await drawWidgets(toss, reservation);
    return await drawn.widgets.requestPayment(request);
  }
  const payments = toss.payment({ customerKey: payment.customerKey });
  await payments.requestPayment({
    ...request,
    method,
    amount: { currency, value: amount },
    ...(method === "VIRTUAL_ACCOUNT" && { virtualAccount: { validHours: DEPOSIT_HOURS } }),
  });
}

/** Opens the payment; rejects if the page could not be opened: no money moved. */
export async function pay(reservation, method) {
  if (reservation.payment.checkoutUrl) location.assign(checkoutAddress(reservation));
  else await payBySdk(reservation, method);
}
