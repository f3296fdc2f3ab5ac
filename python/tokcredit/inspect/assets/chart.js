// A frame with axes, and marks in it. Charts are pictures of numbers they are given.

const FRAME = { width: 470, height: 218, left: 44, right: 10, top: 8, bottom: 32 };

class Chart {
  constructor(x, y, label) {
    const { width, height, left, right, top, bottom } = FRAME;
    this.svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    this.x = (v) => left + ((v - x[0]) / (x[1] - x[0] || 1)) * (width - left - right);
    this.y = (v) => height - bottom - ((Math.max(y[0], Math.min(y[1], v)) - y[0]) / (y[1] - y[0] || 1)) * (height - top - bottom);
    this.domain = { x, y };
  }

  axes(xTicks, yTicks, xName, xText = brief, yText = brief) {
    const { width, height, left, right, bottom } = FRAME;
    for (const v of yTicks) {
      this.svg.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: this.y(v), y2: this.y(v) }));
      this.svg.append(draw("text", { x: left - 7, y: this.y(v) + 4, "text-anchor": "end" }, yText(v)));
    }
    for (const v of xTicks) this.svg.append(draw("text", { x: this.x(v), y: height - bottom + 16, "text-anchor": "middle" }, xText(v)));
    this.svg.append(draw("text", { x: width - right, y: height - 1, "text-anchor": "end" }, xName));
    return this;
  }

  bar(x0, x1, y0, y1, kind = "") {
    const left = this.x(x0) + 0.5, top = Math.min(this.y(y0), this.y(y1));
    this.svg.append(draw("rect", { class: `bar ${kind}`, x: left, width: Math.max(0.8, this.x(x1) - left - 0.5), y: top, height: Math.abs(this.y(y0) - this.y(y1)) }));
  }

  line(points, kind = "") {
    const parts = points.map(([x, y], i) => (y === null ? null : `${i && points[i - 1][1] !== null ? "L" : "M"}${this.x(x).toFixed(1)},${this.y(y).toFixed(1)}`));
    this.svg.append(draw("path", { class: `line ${kind}`, d: parts.filter(Boolean).join("") }));
  }

  band(points, kind = "") {
    const known = points.filter(([, low]) => low !== null);
    const there = known.map(([x, low]) => `${this.x(x).toFixed(1)},${this.y(low).toFixed(1)}`);
    const back = known.map(([x, , high]) => `${this.x(x).toFixed(1)},${this.y(high).toFixed(1)}`).reverse();
    if (known.length) this.svg.append(draw("path", { class: `band ${kind}`, d: `M${[...there, ...back].join("L")}Z` }));
  }

  // What lies under the pointer, column by column.
  tips(edges, tell) {
    const { height, top, bottom } = FRAME;
    for (let i = 0; i + 1 < edges.length; i++) {
      const text = tell(i);
      if (!text) continue;
      const x = this.x(edges[i]);
      const area = draw("rect", { class: "hit-area", x, width: Math.max(1, this.x(edges[i + 1]) - x), y: top, height: height - top - bottom });
      area.addEventListener("pointerenter", () => showCard(area, text.map((t) => el("div", {}, t))));
      area.addEventListener("pointerleave", hideCard);
      this.svg.append(area);
    }
    return this;
  }
}

function figure(title, caption, body, ...more) {
  return el("figure", {}, el("h3", {}, title), el("figcaption", {}, caption), body, ...more);
}

function ticks(low, high, about = 4) {
  const rough = (high - low) / about || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((s) => s * power).find((s) => s >= rough * 0.999);
  const out = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) out.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return out;
}

function brief(x) {
  const a = Math.abs(x), text = a >= 1e4 ? `${+(a / 1e3).toPrecision(3)}k` : `${+a.toPrecision(3)}`;
  return x < 0 ? "−" + text : text;
}

function percent(x, digits = 1) {
  return x === null ? "–" : x && x * 100 < 0.1 ** digits ? `< ${0.1 ** digits}%` : `${(x * 100).toFixed(digits)}%`;
}

const whole = (x) => x.toLocaleString("en");
const largest = (numbers) => numbers.reduce((a, b) => Math.max(a, b ?? 0), 0);
