// Draws the board: the stock over time, the running verdict, and at the end the full one.
// In Locust's page it sits below the table of the tab "Stock"; in a verdict's page it is alone.
"use strict";

(() => {
  const POLL_MS = 1000;
  const WIDTH = 480;
  const HEIGHT = 200;
  const EDGE = { left: 44, right: 8, top: 10, bottom: 22 };
  const STACK = ["sold", "held", "available"];
  const STATES = {
    idle: "no run yet",
    running: "running: nothing wrong so far",
    settling: "settling: the last holds end, SQL catches up",
    broken: "no verdict: the books could not be read",
    "not begun": "this run could not begin",
  };

  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };

  const shape = (name, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  };

  // Stacked areas: sold at the bottom, so that the rest shrinks from above.
  const chart = (sku, samples) => {
    const last = samples[samples.length - 1];
    const end = Math.max(1, last.seconds);
    const top = Math.max(1, ...samples.map((one) => Math.max(one.total, one.sold)));
    const x = (seconds) => EDGE.left + (seconds / end) * (WIDTH - EDGE.left - EDGE.right);
    const y = (pieces) => HEIGHT - EDGE.bottom - (pieces / top) * (HEIGHT - EDGE.top - EDGE.bottom);
    const label = `${sku}: ${last.available} available, ${last.held} held, ${last.sold} sold of ${last.total}`;
    const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
    let below = samples.map(() => 0);
    for (const name of STACK) {
      const above = samples.map((one, at) => below[at] + one[name]);
      const there = samples.map((one, at) => `${x(one.seconds)},${y(above[at])}`);
      const back = samples.map((one, at) => `${x(one.seconds)},${y(below[at])}`).reverse();
      svg.append(shape("polygon", { class: name, points: [...there, ...back].join(" ") }));
      below = above;
    }
    const line = samples.map((one) => `${x(one.seconds)},${y(one.total)}`).join(" ");
    svg.append(shape("polyline", { class: "total", points: line }));
    svg.append(shape("path", { class: "axis", d: `M${x(0)} ${EDGE.top}V${y(0)}H${WIDTH - EDGE.right}` }));
    for (const pieces of [0, top]) {
      svg.append(shape("text", { x: EDGE.left - 6, y: y(pieces) + 4, "text-anchor": "end" }, String(pieces)));
    }
    svg.append(shape("text", { x: x(0), y: HEIGHT - 6 }, "0 s"));
    svg.append(shape("text", { x: x(end), y: HEIGHT - 6, "text-anchor": "end" }, `${end.toFixed(0)} s`));
    return element("figure", {}, element("figcaption", { textContent: label }), svg);
  };

  const charts = (samples) => {
    const bySku = new Map();
    for (const one of samples) bySku.set(one.sku, [...(bySku.get(one.sku) ?? []), one]);
    const key = element("p", { className: "keys" });
    for (const name of STACK) key.append(element("span", { className: `key ${name}` }), name);
    const all = element("div", { className: "charts" });
    for (const [sku, its] of bySku) all.append(chart(sku, its));
    return [element("h2", { textContent: "Stock over time" }), key, all];
  };

  const facts = (pairs) =>
    element("ul", { className: "facts" },
      ...pairs.map(([name, value]) =>
        element("li", {}, `${name} `, element("b", { textContent: value.toLocaleString("en") }))));

  const table = (heads, rows) =>
    element("table", {},
      element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col", textContent: head })))),
      element("tbody", {}, ...rows.map((row) =>
        element("tr", {}, ...row.map((cell) => element("td", { textContent: cell }))))));

  const word = (board) => {
    const { verdict, problems = [], state } = board;
    if (verdict) {
      const text = verdict.ok
        ? `clean: ${verdict.sold} of ${verdict.total} sold, 0 oversold; stock, orders, money and answers agree`
        : `not clean: ${verdict.problems.length} problems`;
      return element("p", { className: `word ${verdict.ok ? "clean" : "wrong"}`, textContent: text });
    }
    const begun = state !== "not begun";
    const wrong = problems.length > 0 || state === "broken";
    const text = problems.length > 0 && begun ? `${problems.length} problems so far` : STATES[state];
    return element("p", { className: `word ${wrong ? "wrong" : ""}`, textContent: text });
  };

  const full = (verdict) => [
    element("h2", { textContent: "The books" }),
    facts([
      ["sale", verdict.saleId], ["scenario", verdict.scenario], ["users at most", verdict.users],
      ["requests", verdict.requests], ["failures", verdict.failures], ["orders in SQL", verdict.orders],
      ["answers checked", verdict.answersChecked], ["confirmed, in SQL", verdict.confirmedAmount],
      ["charged at the PG", verdict.charged], ["given back", verdict.cancelled],
    ]),
  ];

  const requests = (verdict) => [
    element("h2", { textContent: "Requests" }),
    table(["what", "requests", "failures", "per second", "median ms", "95 %", "99 %"],
      verdict.statistics.map((one) => [
        `${one.method} ${one.name}`, one.requests, one.failures, one.perSecond,
        one.medianMs, one.p95Ms, one.p99Ms,
      ])),
  ];

  const drawBoard = (place, board) => {
    const { verdict } = board;
    const problems = verdict?.problems ?? board.problems ?? [];
    const lives = Object.entries(verdict?.lives ?? board.lives ?? {});
    const parts = [element("h2", { textContent: "Verdict" }), word(board)];
    if (problems.length > 0) {
      parts.push(element("ul", { className: "problems" },
        ...problems.map((problem) => element("li", { textContent: problem }))));
    }
    if (verdict) {
      parts.push(...full(verdict));
    } else if (board.state !== "idle" && board.state !== "not begun") {
      parts.push(facts([
        ["sale", board.saleId], ["scenario", board.scenario], ["seconds", board.seconds],
        ["requests", board.requests], ["failures", board.failures], ["orders told of", board.orders],
      ]));
    }
    if (board.samples.length > 0) parts.push(...charts(board.samples));
    if (lives.length > 0) {
      parts.push(element("h2", { textContent: "How the buyers ended" }), table(["who: how", "how many"], lives));
    }
    if (verdict?.statistics.length > 0) parts.push(...requests(verdict));
    place.replaceChildren(...parts);
  };

  const board = element("section", { className: "board" });
  board.setAttribute("aria-label", "Stock and verdict");

  // Locust may redraw its tab at any time: the board goes where the table is now.
  const settle = () => {
    const table = document.querySelector('[data-sortkey="oversold"]')?.closest("table");
    if (!table) return false;
    if (board.parentElement !== table.parentElement) table.parentElement.append(board);
    return true;
  };

  const poll = async () => {
    try {
      if (settle()) {
        const answer = await fetch("./stock/board.json");
        if (answer.ok) drawBoard(board, await answer.json());
      }
    } catch (error) {
      console.warn("the board could not be read", error);
    }
    setTimeout(poll, POLL_MS);
  };

  if (window.boardData) {
    document.body.append(board);
    drawBoard(board, window.boardData);
  } else {
    poll();
  }
})();
