// The stock of each item: the counters, and a chart of them since this page was opened.

const WIDTH = 300;
const HEIGHT = 60;
/** Readings in a chart: four minutes of one every two seconds. */
const SAMPLES_MAX = 120;
const STACK = ["sold", "held", "available"];

const shape = (name, attributes) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};

export class StockChart {
  #samples = new Map();

  constructor(place) {
    this.place = place;
  }

  /** Clears the chart for another sale. */
  clear() {
    this.#samples.clear();
    this.place.replaceChildren();
  }

  show(items) {
    this.place.replaceChildren(...items.map((item) => this.#row(item)));
  }

  #row(item) {
    const samples = [...(this.#samples.get(item.sku) ?? []), item].slice(-SAMPLES_MAX);
    this.#samples.set(item.sku, samples);
    const row = document.createElement("div");
    const words = document.createElement("p");
    const name = document.createElement("strong");
    row.className = "item-board";
    row.dataset.sku = item.sku;
    name.textContent = item.name;
    words.append(name, ` ${item.available} available, ${item.held} held, ${item.sold} sold of ${item.total}`);
    row.append(words, chart(samples));
    return row;
  }
}

/** A stacked area chart, sold at the bottom; the text next to it has the same values. */
function chart(samples) {
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const points = samples.length > 1 ? samples : [...samples, ...samples];
  const top = Math.max(1, ...points.map(({ total }) => total));
  const x = (at) => (at * WIDTH) / (points.length - 1);
  const y = (pieces) => HEIGHT - (pieces * HEIGHT) / top;
  let below = points.map(() => 0);
  for (const part of STACK) {
    const above = points.map((one, at) => below[at] + one[part]);
    const there = above.map((pieces, at) => `${x(at)},${y(pieces)}`);
    const back = below.map((pieces, at) => `${x(at)},${y(pieces)}`).reverse();
    svg.append(shape("polygon", { class: part, points: [...there, ...back].join(" ") }));
    below = above;
  }
  return svg;
}
