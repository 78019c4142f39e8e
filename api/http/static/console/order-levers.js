// The changes of an order without its refund: release and resolve.

const LEVERS = {
  release: {
    states: ["HELD", "PREPARED", "AWAITING_DEPOSIT"],
    title: "Release this order?",
    text: "Its pieces go back on sale. An open account is cancelled first; if the deposit came meanwhile, the order is sold.",
  },
  resolve: {
    states: ["CONFIRMING", "AWAITING_DEPOSIT"],
    title: "Look the payment up now?",
    text: "The service asks the PG now, and settles what it shows. An open account stays open.",
  },
};

const $ = (id) => document.getElementById(id);

/** Shows the levers that the order's state allows. */
export function drawLevers({ status }) {
  for (const [verb, { states }] of Object.entries(LEVERS)) $(verb).hidden = !states.includes(status);
}

/** Calls `act(verb, title, text)` at each press of a lever. */
export function onLever(act) {
  for (const [verb, { title, text }] of Object.entries(LEVERS)) {
    $(verb).addEventListener("click", () => act(verb, title, text));
  }
}
