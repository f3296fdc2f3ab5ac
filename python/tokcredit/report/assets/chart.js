// A frame with axes, and marks in it. Charts are pictures of numbers they are given.

const FRAME = { width: 470, height: 218, left: 44, right: 10, top: 8, bottom: 32 };

class Chart {
  constructor(x, y, label) {
    const { width, height, left, right, top, bottom } = FRAME;
    this.svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    const inner = { x: width - left - right, y: height - top - bottom };
    const within = (v, [low, high]) => (Math.max(low, Math.min(high, v)) - low) / (high - low || 1);
    this.x = (v) => left + within(v, x) * inner.x;
    this.y = (v) => height - bottom - within(v, y) * inner.y;
  }

  axes(xTicks, yTicks, xName, xText = brief, yText = brief) {
    const { width, height, left, right, bottom } = FRAME;
    const text = (x, y, anchor, words) => this.svg.append(draw("text", { x, y, "text-anchor": anchor }, words));
    for (const v of yTicks) {
      const y = this.y(v);
      this.svg.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: y, y2: y }));
      text(left - 7, y + 4, "end", yText(v));
    }
    for (const v of xTicks) text(this.x(v), height - bottom + 16, "middle", xText(v));
    text(width - right, height - 1, "end", xName);
  }

  bar(x0, x1, y0, y1, kind = "") {
    const x = this.x(x0) + 0.5, y = Math.min(this.y(y0), this.y(y1)), height = Math.abs(this.y(y0) - this.y(y1));
    this.svg.append(draw("rect", { class: `bar ${kind}`, x, y, width: Math.max(0.8, this.x(x1) - x - 0.5), height }));
  }

  place(x, y) {
    return `${this.x(x).toFixed(1)},${this.y(y).toFixed(1)}`;
  }

  // Points whose height is null interrupt the line.
  line(points, kind = "") {
    let d = "", on = false;
    for (const [x, y] of points) {
      if (y !== null) d += `${on ? "L" : "M"}${this.place(x, y)}`;
      on = y !== null;
    }
    this.svg.append(draw("path", { class: `line ${kind}`, d }));
  }

  band(points, kind = "") {
    const known = points.filter(([, low]) => low !== null);
    if (!known.length) return;
    const there = known.map(([x, low]) => this.place(x, low)), back = known.map(([x, , high]) => this.place(x, high));
    this.svg.append(draw("path", { class: `band ${kind}`, d: `M${[...there, ...back.reverse()].join("L")}Z` }));
  }

  // What is under the pointer, column by column: `tell` gives the lines of a column, or nothing.
  tips(edges, tell) {
    const { height, top, bottom } = FRAME;
    for (let i = 0; i + 1 < edges.length; i++) {
      const lines = tell(i), x = this.x(edges[i]), width = Math.max(1, this.x(edges[i + 1]) - x);
      if (!lines) continue;
      const area = draw("rect", { class: "hit-area", x, width, y: top, height: height - top - bottom });
      area.addEventListener("pointerenter", () => showCard(area, lines.map((line) => el("div", {}, line))));
      area.addEventListener("pointerleave", hideCard);
      this.svg.append(area);
    }
    return this.svg;
  }
}

function figure(title, caption, ...body) {
  return el("figure", {}, el("h3", {}, title), el("figcaption", {}, caption), ...body);
}

function key(...entries) {
  return el("p", { class: "key" }, ...entries.map(([kind, text]) => el("span", {}, el("i", { class: kind }), text)));
}

function ticks(low, high, about = 4) {
  const rough = (high - low) / about || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((s) => s * power).find((s) => s >= rough * 0.999), out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) out.push(i * step);
  return out;
}

function brief(x) {
  const a = Math.abs(x), text = a >= 1e4 ? `${+(a / 1e3).toPrecision(3)}k` : `${+a.toPrecision(3)}`;
  return x < 0 ? "−" + text : text;
}

function percent(x, digits = 1) {
  if (x === null) return "–";
  return x && x * 100 < 0.1 ** digits ? `< ${0.1 ** digits}%` : `${(x * 100).toFixed(digits)}%`;
}

const whole = (x) => x.toLocaleString("en");
const largest = (numbers) => numbers.reduce((a, b) => Math.max(a, b ?? 0), 0);
