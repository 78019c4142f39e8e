// Internationalization: the pages' texts in English and Korean, formats of money and time.

const ENGLISH = {
  brand: "Flash sale",
  loading: "Loading…",
  sales: "Sales",
  noSales: "There is no sale yet.",
  backToSale: "Back to the sale",
  backToSales: "All sales",
  tryAgain: "Try again",
  "status.scheduled": "Opens soon",
  "status.open": "Open",
  "status.paused": "Paused",
  "status.sold_out": "Sold out",
  "status.closed": "Over",
  opensIn: "Opens in",
  closesIn: "Closes in",
  opensAt: "Opens {time}",
  closesAt: "Closes {time}",
  closedAt: "Closed {time}",
  days: "{count} d",
  leftOf: "{count} of {total} left",
  allHeld: "All held right now; some may come back",
  soldOut: "Sold out",
  limit: "Up to {count} each",
  quantityOf: "Quantity of {name}",
  oneLess: "One less of {name}",
  oneMore: "One more of {name}",
  total: "Total",
  buy: "Buy",
  buying: "Taking…",
  choose: "Choose how many you would like.",
  policyHold: "Buy keeps your pieces for {minutes} while you pay.",
  policySuccess: "The pieces are yours once the payment goes through.",
  minutes: "{count} min",
  holdTitle: "Held for you",
  preparedTitle: "Ready to pay",
  holdLeft: "Time left to pay",
  pay: "Pay {amount}",
  giveBack: "Give back",
  payHow: "How to pay",
  payByCard: "Card",
  payByAccount: "Bank transfer (virtual account)",
  paying: "Opening the payment page…",
  holdStays: "Your pieces stay held if you reload or come back from the payment page.",
  settlingHere: "A payment of yours is still being checked.",
  depositHere: "An order of yours waits for your deposit.",
  orders: "Your orders in this sale",
  "order.HELD": "Held",
  "order.PREPARED": "Ready to pay",
  "order.CONFIRMING": "Payment being checked",
  "order.AWAITING_DEPOSIT": "Waiting for your deposit",
  "order.CONFIRMED": "Paid",
  "order.RELEASED": "Given back",
  "order.EXPIRED": "Ran out",
  "order.REFUNDED": "Refunded",
  released: "Given back.",
  holdOver: "The time to pay ran out and the pieces were given back. If you did not finish a payment, nothing was charged.",
  endedElsewhere: "This hold has ended.",
  stillTrying: "No clear answer yet. Nothing was charged. Asking again…",
  "say.opened": "The sale is open.",
  "say.closed": "The sale is over.",
  "say.soldOut": "{name} is sold out.",
  "say.back": "{name} is available again.",
  "say.few": "{name}: {count} left.",
  "say.timeLeft": "{time} left to pay.",
  "say.total": "Total {amount}.",
  seconds: "{count} seconds",

  resultTitle: "Your order",
  resultOrder: "Order",
  resultNumber: "Order number",
  resultAmount: "Amount",
  "result.confirmed": "Paid. It is yours.",
  "result.confirmed.money": "{amount} was charged, once.",
  "result.settling": "Your payment is being checked",
  "result.settling.money": "We do not know yet whether your money was taken. Your pieces stay held, and you will not be charged twice. This page changes by itself.",
  "result.settling.later": "This takes longer than usual. We go on checking with the payment provider; look at this page again later. You will not be charged twice.",
  "result.awaiting_deposit": "Waiting for your deposit",
  "result.awaiting_deposit.money": "No money was taken yet. Transfer {amount} to the account below by {time}; your pieces stay held until then.",
  "result.awaiting_deposit.hidden": "No money was taken yet. The account number cannot be shown at the moment; this page asks for it again by itself.",
  accountBank: "Bank",
  accountNumber: "Account number",
  accountHolder: "Account holder",
  accountDue: "Transfer by",
  copyAccount: "Copy the account number",
  copied: "Copied",
  "result.declined": "The payment did not go through",
  "result.declined.money": "Money that was taken after all is sent back. The pieces went back on sale.",
  "result.prepared": "The payment did not go through",
  "result.prepared.money": "Money that was taken after all is sent back. Nothing is held for you; while there is some left you can pay until {time}.",
  "result.held": "The payment did not go through",
  "result.held.money": "Money that was taken after all is sent back. The pieces are still held for you until {time}.",
  "result.expired": "The time ran out",
  "result.expired.money": "Money that was taken after all is sent back. The pieces went back on sale.",
  "result.sold_out": "Somebody was faster",
  "result.sold_out.money": "Money that was taken after all is sent back. The pieces were gone when the payment came back.",
  "result.refunded": "Refunded",
  "result.refunded.money": "{amount} was charged and then sent back to you.",
  "result.invalid": "This link does not work",
  "result.invalid.money": "Opening it took no money. If you paid before, your order is unchanged.",
  "result.unreadable": "This order cannot be shown here",
  "result.unreadable.money": "Opening this page took no money. Look at the order in the browser in which you bought.",
  "result.offline": "The shop does not answer",
  "result.offline.money": "Looking at this page takes no money. Your order is unchanged: load the page again in a moment.",
  goOnPaying: "Go on to pay",

  "error.network": "The shop could not be reached. Nothing was charged. Press the button again: it never takes twice.",
  "error.no_guests": "Buyers sign in at this shop's own pages. Nothing was charged.",
  "error.network.read": "The shop could not be reached. Nothing was charged by this.",
  "error.malformed_request": "The shop did not understand the page. Nothing was charged. Load the page again.",
  "error.unauthenticated": "Your visit had ended. Nothing was charged. Please try again.",
  "error.forbidden": "That is not allowed here. Nothing was charged.",
  "error.invalid_admission": "The page was open for too long. Nothing was charged. Please try again.",
  "error.invalid_token": "This link is not valid any more. Nothing was charged by opening it.",
  "error.sale_not_found": "There is no such sale. Nothing was charged.",
  "error.sku_not_found": "This item is not on sale any more. Nothing was charged.",
  "error.reservation_not_found": "There is no such order in this browser. Nothing was charged by this.",
  "error.sale_not_open": "The sale has not opened yet. Nothing was charged.",
  "error.sale_closed": "The sale is over. Nothing was charged.",
  "error.sale_paused": "The sale is paused for a moment. Nothing was charged. Try again soon.",
  "error.sale_recovering": "The shop is being restored; no money is lost. Try again in a moment.",
  "error.sold_out": "Not enough pieces are left. Nothing was charged.",
  "error.sold_out.later": "Held pieces may come back from {time} on.",
  "error.buyer_limit_exceeded": "That is more than one buyer may have. Nothing was charged.",
  "error.buyer_limit_exceeded.counts": "The limit is {limit}, and you hold or bought {taken}.",
  "error.amount_mismatch": "The price has changed. Nothing was charged. Look at the new total and press Buy again.",
  "error.idempotency_key_reused": "The basket changed on the way. Nothing was charged. Press Buy again.",
  "error.too_many_orders": "Too many of your orders in this sale ended unpaid. Nothing was charged. You cannot reserve here any more.",
  "error.rate_limited": "That was too fast. Nothing was charged. Wait a moment and try again.",
  "error.unavailable": "The shop cannot answer now. Nothing was charged and nothing was taken. Try again in a moment.",
  "error.outcome_unknown": "It is not clear whether the pieces were held. Nothing was charged. Press the button again: it never takes twice.",
  "error.payment_in_progress": "A payment is under way for these pieces, so they cannot be given back now. Your order says when it is decided whether money was taken.",
  "error.already_confirmed": "These pieces are paid already: you were charged once, and they are yours.",
  "error.reservation_expired": "The time ran out and the pieces are gone. If money was taken after all, it is sent back.",
  "error.hold_lost": "The hold was lost in a failure of ours. If money was taken after all, it is sent back. Please try again.",
  "error.payment_declined": "The payment was declined. Money that was taken after all is sent back.",
  "error.payment_page": "The payment page could not be opened. Nothing was charged. Your pieces are still held.",
  "error.internal_error": "Something went wrong on our side. Nothing was charged by this page.",
  "error.other": "That did not work. Nothing was charged by this page.",
  reference: "Reference {id}",
};

const KOREAN = {
  brand: "플래시 세일",
  loading: "불러오는 중…",
  sales: "세일 목록",
  noSales: "아직 진행 중인 세일이 없습니다.",
  backToSale: "세일로 돌아가기",
  backToSales: "전체 세일",
  tryAgain: "다시 시도",
  "status.scheduled": "오픈 예정",
  "status.open": "판매 중",
  "status.paused": "일시 중지",
  "status.sold_out": "품절",
  "status.closed": "종료",
  opensIn: "오픈까지",
  closesIn: "종료까지",
  opensAt: "{time} 오픈",
  closesAt: "{time} 종료",
  closedAt: "{time} 종료됨",
  days: "{count}일",
  leftOf: "{total}개 중 {count}개 남음",
  allHeld: "다른 고객이 결제 중, 다시 나올 수 있음",
  soldOut: "품절",
  limit: "1인 최대 {count}개",
  quantityOf: "{name} 수량",
  oneLess: "{name} 한 개 빼기",
  oneMore: "{name} 한 개 더하기",
  total: "합계",
  buy: "구매하기",
  buying: "확보하는 중…",
  choose: "수량을 선택해 주세요.",
  policyHold: "구매하기를 누르면 결제하는 동안 {minutes} 상품을 잡아 둡니다.",
  policySuccess: "결제가 완료되면 상품이 확정됩니다.",
  minutes: "{count}분간",
  holdTitle: "상품을 잡아 두었습니다",
  preparedTitle: "결제 준비 완료",
  holdLeft: "남은 결제 시간",
  pay: "{amount} 결제하기",
  giveBack: "구매 취소",
  payHow: "결제 방법",
  payByCard: "카드",
  payByAccount: "가상계좌 (무통장 입금)",
  paying: "결제 페이지를 여는 중…",
  holdStays: "새로고침하거나 결제 페이지에서 돌아와도 상품은 그대로 유지됩니다.",
  settlingHere: "확인 중인 결제가 있습니다.",
  depositHere: "입금을 기다리는 주문이 있습니다.",
  orders: "이 세일의 내 주문",
  "order.HELD": "확보됨",
  "order.PREPARED": "결제 대기",
  "order.CONFIRMING": "결제 확인 중",
  "order.AWAITING_DEPOSIT": "입금 대기",
  "order.CONFIRMED": "결제 완료",
  "order.RELEASED": "취소됨",
  "order.EXPIRED": "시간 만료",
  "order.REFUNDED": "환불됨",
  released: "구매를 취소했습니다.",
  holdOver: "결제 시간이 지나 구매가 취소되었습니다. 결제를 마치지 않았다면 결제되지 않았습니다.",
  endedElsewhere: "이 상품 확보는 끝났습니다.",
  stillTrying: "아직 확실한 응답이 없습니다. 결제되지 않았습니다. 다시 확인하는 중…",
  "say.opened": "세일이 시작되었습니다.",
  "say.closed": "세일이 종료되었습니다.",
  "say.soldOut": "{name} 품절입니다.",
  "say.back": "{name} 다시 구매할 수 있습니다.",
  "say.few": "{name} {count}개 남았습니다.",
  "say.timeLeft": "결제 시간이 {time} 남았습니다.",
  "say.total": "합계 {amount}.",
  seconds: "{count}초",

  resultTitle: "주문 결과",
  resultOrder: "주문",
  resultNumber: "주문 번호",
  resultAmount: "금액",
  "result.confirmed": "결제가 완료되었습니다",
  "result.confirmed.money": "한 번만 결제되었습니다: {amount}",
  "result.settling": "결제를 확인하고 있습니다",
  "result.settling.money": "결제가 되었는지 아직 알 수 없습니다. 상품은 그대로 유지되며 두 번 결제되지 않습니다. 이 페이지는 자동으로 바뀝니다.",
  "result.settling.later": "평소보다 오래 걸리고 있습니다. 결제사에 계속 확인하고 있으니 나중에 이 페이지를 다시 확인해 주세요. 두 번 결제되지 않습니다.",
  "result.awaiting_deposit": "입금을 기다리고 있습니다",
  "result.awaiting_deposit.money": "아직 결제되지 않았습니다. {time}까지 아래 계좌로 입금해 주세요: {amount}. 그때까지 상품은 그대로 유지됩니다.",
  "result.awaiting_deposit.hidden": "아직 결제되지 않았습니다. 지금은 계좌번호를 표시할 수 없습니다. 이 페이지가 자동으로 다시 확인합니다.",
  accountBank: "은행",
  accountNumber: "계좌번호",
  accountHolder: "예금주",
  accountDue: "입금 기한",
  copyAccount: "계좌번호 복사",
  copied: "복사했습니다",
  "result.declined": "결제가 완료되지 않았습니다",
  "result.declined.money": "혹시 결제된 금액이 있으면 환불됩니다. 상품은 다시 판매됩니다.",
  "result.prepared": "결제가 완료되지 않았습니다",
  "result.prepared.money": "혹시 결제된 금액이 있으면 환불됩니다. 상품이 확보된 것은 아니며, 남아 있으면 {time}까지 결제할 수 있습니다.",
  "result.held": "결제가 완료되지 않았습니다",
  "result.held.money": "혹시 결제된 금액이 있으면 환불됩니다. 상품은 {time}까지 그대로 유지됩니다.",
  "result.expired": "시간이 지났습니다",
  "result.expired.money": "혹시 결제된 금액이 있으면 환불됩니다. 상품은 다시 판매됩니다.",
  "result.sold_out": "상품이 모두 팔렸습니다",
  "result.sold_out.money": "혹시 결제된 금액이 있으면 환불됩니다. 결제에서 돌아왔을 때 상품이 남아 있지 않았습니다.",
  "result.refunded": "환불되었습니다",
  "result.refunded.money": "결제된 뒤 환불되었습니다: {amount}",
  "result.invalid": "사용할 수 없는 링크입니다",
  "result.invalid.money": "이 페이지를 열어도 결제되지 않습니다. 이미 결제한 주문은 그대로 있습니다.",
  "result.unreadable": "여기에서는 주문을 볼 수 없습니다",
  "result.unreadable.money": "이 페이지를 열어도 결제되지 않습니다. 구매한 브라우저에서 주문을 확인해 주세요.",
  "result.offline": "상점이 응답하지 않습니다",
  "result.offline.money": "이 페이지를 보는 것으로는 결제되지 않습니다. 주문은 그대로이니 잠시 후 새로고침해 주세요.",
  goOnPaying: "이어서 결제하기",

  "error.network": "상점에 연결할 수 없습니다. 결제되지 않았습니다. 버튼을 다시 눌러 주세요. 두 번 처리되지 않습니다.",
  "error.no_guests": "이 상점은 로그인 후 구매할 수 있습니다. 결제되지 않았습니다.",
  "error.network.read": "상점에 연결할 수 없습니다. 이로 인해 결제되지 않았습니다.",
  "error.malformed_request": "요청을 처리할 수 없습니다. 결제되지 않았습니다. 페이지를 새로고침해 주세요.",
  "error.unauthenticated": "방문 시간이 끝났습니다. 결제되지 않았습니다. 다시 시도해 주세요.",
  "error.forbidden": "허용되지 않은 요청입니다. 결제되지 않았습니다.",
  "error.invalid_admission": "페이지를 연 지 오래되었습니다. 결제되지 않았습니다. 다시 시도해 주세요.",
  "error.invalid_token": "더 이상 유효하지 않은 링크입니다. 열어도 결제되지 않습니다.",
  "error.sale_not_found": "그런 세일이 없습니다. 결제되지 않았습니다.",
  "error.sku_not_found": "더 이상 판매하지 않는 상품입니다. 결제되지 않았습니다.",
  "error.reservation_not_found": "이 브라우저에는 그런 주문이 없습니다. 이로 인해 결제되지 않았습니다.",
  "error.sale_not_open": "아직 세일이 시작되지 않았습니다. 결제되지 않았습니다.",
  "error.sale_closed": "세일이 종료되었습니다. 결제되지 않았습니다.",
  "error.sale_paused": "세일이 잠시 중지되었습니다. 결제되지 않았습니다. 곧 다시 시도해 주세요.",
  "error.sale_recovering": "상점을 복구하고 있습니다. 결제된 금액은 안전합니다. 잠시 후 다시 시도해 주세요.",
  "error.sold_out": "남은 수량이 부족합니다. 결제되지 않았습니다.",
  "error.sold_out.later": "다른 고객이 잡아 둔 상품이 {time}부터 다시 나올 수 있습니다.",
  "error.buyer_limit_exceeded": "1인 구매 한도를 넘었습니다. 결제되지 않았습니다.",
  "error.buyer_limit_exceeded.counts": "한도는 {limit}개이며, 이미 {taken}개를 잡아 두었거나 구매했습니다.",
  "error.amount_mismatch": "가격이 바뀌었습니다. 결제되지 않았습니다. 새 합계를 확인하고 다시 구매하기를 눌러 주세요.",
  "error.idempotency_key_reused": "처리 중에 수량이 바뀌었습니다. 결제되지 않았습니다. 다시 구매하기를 눌러 주세요.",
  "error.too_many_orders": "이 판매에서 결제하지 않고 끝난 주문이 너무 많습니다. 결제되지 않았습니다. 더 이상 예약할 수 없습니다.",
  "error.rate_limited": "요청이 너무 빠릅니다. 결제되지 않았습니다. 잠시 후 다시 시도해 주세요.",
  "error.unavailable": "지금은 상점이 응답할 수 없습니다. 결제되지 않았고 상품도 확보되지 않았습니다. 잠시 후 다시 시도해 주세요.",
  "error.outcome_unknown": "상품이 확보되었는지 확실하지 않습니다. 결제되지 않았습니다. 버튼을 다시 눌러 주세요. 두 번 처리되지 않습니다.",
  "error.payment_in_progress": "결제가 진행 중이라 지금은 취소할 수 없습니다. 결제 여부는 주문에서 확인할 수 있습니다.",
  "error.already_confirmed": "이미 결제된 상품입니다. 한 번만 결제되었습니다.",
  "error.reservation_expired": "시간이 지나 상품이 남아 있지 않습니다. 혹시 결제된 금액이 있으면 환불됩니다.",
  "error.hold_lost": "장애로 상품 확보가 취소되었습니다. 혹시 결제된 금액이 있으면 환불됩니다. 다시 시도해 주세요.",
  "error.payment_declined": "결제가 거절되었습니다. 혹시 결제된 금액이 있으면 환불됩니다.",
  "error.payment_page": "결제 페이지를 열 수 없습니다. 결제되지 않았습니다. 상품은 그대로 유지됩니다.",
  "error.internal_error": "문제가 발생했습니다. 이 페이지에서 결제되지 않았습니다.",
  "error.other": "처리하지 못했습니다. 이 페이지에서 결제되지 않았습니다.",
  reference: "문의 번호 {id}",
};

export const TEXTS = { en: ENGLISH, ko: KOREAN };

export const language = pick(navigator.languages ?? [navigator.language]);

function pick(wanted) {
  for (const tag of wanted) {
    const short = tag.slice(0, 2).toLowerCase();
    if (short in TEXTS) return short;
  }
  return "en";
}

/** The sentence of this name, with its values filled in. */
export function t(name, values = {}) {
  const sentence = TEXTS[language][name] ?? name;
  return sentence.replace(/\{(\w+)\}/g, (whole, value) => values[value] ?? whole);
}

export function has(name) {
  return name in TEXTS[language];
}

/** Translates the page's own texts, marked with data-t, into the buyer's language. */
export function translatePage(title) {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-t]")) {
    element.textContent = t(element.dataset.t);
  }
  if (title) document.title = `${title} · ${t("brand")}`;
}

/** An amount in the currency's minor unit, formatted for people. */
export function money(amount, currency) {
  const format = new Intl.NumberFormat(language, { style: "currency", currency });
  const digits = format.resolvedOptions().maximumFractionDigits;
  return format.format(amount / 10 ** digits);
}

export function number(count) {
  return new Intl.NumberFormat(language).format(count);
}

/** Date and time, or the time alone if it is today. */
export function moment(at) {
  const date = new Date(at);
  const today = date.toDateString() === new Date().toDateString();
  const format = today ? { timeStyle: "short" } : { dateStyle: "medium", timeStyle: "short" };
  return new Intl.DateTimeFormat(language, format).format(date);
}

/** A remaining time, in whole seconds: 9:59, 1:09:59, 2 d 01:09:59. */
export function remaining(milliseconds) {
  const seconds = Math.max(0, Math.ceil(milliseconds / 1000));
  const two = (part) => String(part).padStart(2, "0");
  const days = Math.floor(seconds / 86_400);
  const hours = Math.floor(seconds / 3_600) % 24;
  const rest = `${two(Math.floor(seconds / 60) % 60)}:${two(seconds % 60)}`;
  if (days) return `${t("days", { count: days })} ${two(hours)}:${rest}`;
  return hours ? `${hours}:${rest}` : rest.replace(/^0/, "");
}

/** A refusal as a sentence that states whether money was taken. */
export function refusalText(refusal, { reading = false } = {}) {
  const name = reading && refusal.code === "network" ? "error.network.read" : `error.${refusal.code}`;
  const sentences = [t(has(name) ? name : "error.other")];
  const { nextDeadline, limit, taken } = refusal.facts;
  if (refusal.code === "sold_out" && nextDeadline) {
    sentences.push(t("error.sold_out.later", { time: clockTime(nextDeadline) }));
  }
  if (refusal.code === "buyer_limit_exceeded" && limit !== undefined) {
    sentences.push(t("error.buyer_limit_exceeded.counts", { limit, taken }));
  }
  if (refusal.status >= 500 && refusal.facts.instance) {
    sentences.push(t("reference", { id: refusal.facts.instance }));
  }
  return sentences.join(" ");
}

function clockTime(at) {
  return new Intl.DateTimeFormat(language, { timeStyle: "medium" }).format(new Date(at));
}
