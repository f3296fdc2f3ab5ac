// The picture of a prefix tree: one line per rollout, and one band per node, as high as the number of its rollouts.
// Distances between two branches grow with the logarithm of the tokens, so that long runs do not hide branches.

const GUTTER = 176, LEFT = 14, TOP = 20, LETTER = 6.4;

// The picture; `choose` gets a node that was clicked, `go` the number of a rollout.
function treePicture(group, choose, go) {
  const { parent, depth, length, count, value } = group.nodes, size = group.rows.length;
  const lanes = laneOrder(group), inside = parent.map(() => []);
  lanes.forEach((row, lane) => row.path.forEach((v) => inside[v].push(lane)));
  const pitch = Math.max(7, Math.min(22, 560 / size)), thick = Math.min(9, pitch * 0.55);
  const lane = (number) => TOP + (number + 0.5) * pitch;
  const middle = inside.map((own) => lane(own.reduce((a, b) => a + b, 0) / own.length));
  const range = span(group.rows.map((row) => row.reward), value[0]);

  const warp = warped(group), main = document.getElementById("main"), style = getComputedStyle(main);
  const room = Math.max(720, main.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight));
  const breadth = Math.max(warp.least, room - GUTTER - LEFT - 8), labels = LEFT + breadth + 20;
  const x = (position) => LEFT + warp.at(position) * breadth;
  const width = labels + GUTTER - 12, height = size * pitch + 44;
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group",
    "aria-label": `Prefix tree of ${size} rollouts` });
  const bands = [], names = parent.map(() => []);
  let chosen = null;

  function drawBand(v) {
    const root = parent[v] < 0, begin = x(depth[v]), end = Math.max(x(depth[v] + length[v]), begin + (root ? 3 : 1));
    // A child leaves its parent's band at the slice of its own rollouts.
    const above = root ? 0 : inside[parent[v]].indexOf(inside[v][0]);
    const from = root ? middle[v] : middle[parent[v]] + (above + (count[v] - count[parent[v]]) / 2) * thick;
    const bend = root ? begin : begin + Math.min(44, (end - begin) * 0.75);
    const d = flow(root ? begin - 6 : begin, bend, end + 0.5, from, middle[v], count[v] * thick);
    bands[v] = draw("path", { class: "node", d, style: `fill:${mixed(value[v], range)}`, tabindex: v ? -1 : 0,
      role: "button", "aria-pressed": "false", "aria-label": nodeLabel(group, v), "data-node": v });
    const events = { pointerenter: () => { light(v); tell(v); }, pointerleave: () => { light(chosen); hideCard(); },
      focus: () => tell(v), blur: hideCard, click: () => choose(v), keydown: (event) => walk(event, v) };
    for (const [name, act] of Object.entries(events)) bands[v].addEventListener(name, act);
    nameBand(v, bend, end - bend);
  }

  // The value inside a band that is thick enough, its first words above it.
  function nameBand(v, from, room) {
    const half = (count[v] * thick) / 2, y = middle[v];
    if (half >= 7.5 && room > 34) {
      const strong = strength(value[v], range) > 0.45 ? "strong" : "";
      names[v].push(draw("text", { class: `inside ${strong}`, x: from + 5, y: y + 4 }, plain(value[v])));
    }
    if (parent[v] < 0 || pitch < 16 || room < 30) return;
    const most = Math.floor(room / LETTER), all = oneLine(group.nodeTexts(v, 24).join(""));
    const text = all.length > most ? `${all.slice(0, most - 1).trimEnd()}…` : all;
    names[v].push(draw("text", { class: "tag", x: from + 3, y: y - half - 2.5 }, text));
  }

  function drawLabel(row, number) {
    const y = lane(number) + 4, cell = (at, kind, text) =>
      draw("tspan", { x: labels + at, y, class: kind, "text-anchor": at ? "end" : "start" }, text);
    const text = draw("text", { style: pitch < 13 ? `font-size:${(pitch * 0.85).toFixed(1)}px` : null },
      cell(0, "", `${row.number + 1}`), cell(86, sign(row.reward, value[0]), plain(row.reward)),
      cell(140, "dim", whole(row.length)));
    const label = `Rollout ${row.number + 1}, reward ${plain(row.reward)}, ${row.length} tokens`;
    const link = draw("a", { href: `#${group.index}-${row.number}`, "aria-label": label }, text);
    link.addEventListener("click", (event) => { event.preventDefault(); go(row.number); });
    link.addEventListener("pointerenter", () => light(row.leaf, row));
    link.addEventListener("pointerleave", () => light(chosen));
    link.row = row;
    return link;
  }

  function drawFrame() {
    for (const [at, name] of [[0, "rollout"], [86, "reward"], [140, "length"]])
      svg.append(draw("text", { x: labels + at, y: 9, "text-anchor": at ? "end" : "start" }, name));
    for (const tick of warp.ticks(x))
      svg.append(draw("text", { x: x(tick), y: height - 4, "text-anchor": "middle" }, whole(tick)));
    lanes.forEach((row, number) => svg.append(draw("line", { class: "leader", x1: x(row.length) + 6, x2: labels - 6,
      y1: lane(number), y2: lane(number) })));
  }

  function tell(v) {
    const text = group.nodeTexts(v, 60).join("").slice(0, 240);
    showCard(bands[v], [el("div", { class: "token" }, text || "(no common token)"),
      el("div", { class: "place" }, stretch(group, v)), nodeNumbers(group, v)], svg.parentElement.offsetLeft);
  }

  // Dims what has nothing in common with a node, or with one rollout that ends there.
  function light(v, only = null) {
    const meets = (u) => group.rows.some((row) => row.path.includes(u) && (only ? row === only : row.path.includes(v)));
    bands.forEach((band, u) => {
      const off = v !== null && !meets(u);
      for (const part of [band, ...names[u]]) part.classList.toggle("off", off);
    });
    for (const link of svg.querySelectorAll("a"))
      link.classList.toggle("off", v !== null && (only ? link.row !== only : !link.row.path.includes(v)));
  }

  function walk(event, v) {
    const ordered = (nodes) => nodes.toSorted((a, b) => inside[a][0] - inside[b][0]);
    const beside = parent[v] < 0 ? [v] : ordered(group.children[parent[v]]), at = beside.indexOf(v);
    const moves = { ArrowLeft: parent[v], ArrowRight: ordered(group.children[v])[0], ArrowUp: beside[at - 1],
      ArrowDown: beside[at + 1] };
    if (event.key === "Enter" || event.key === " ") choose(v);
    else if (!(event.key in moves)) return;
    else if (moves[event.key] >= 0) {
      bands[v].setAttribute("tabindex", -1);
      bands[moves[event.key]].setAttribute("tabindex", 0);
      bands[moves[event.key]].focus();
    }
    event.preventDefault();
    event.stopPropagation();
  }

  drawFrame();
  parent.forEach((_, v) => drawBand(v));
  svg.append(...bands, ...names.flat(), ...lanes.map(drawLabel));
  const mark = (v) => {
    chosen = v;
    bands.forEach((band, u) => band.setAttribute("aria-pressed", String(u === v)));
    light(v);
  };
  return { svg, lanes, range, mark };
}

// A band of even height: from y0 it bends to y1 until `bend`, then runs on to x1.
function flow(x0, bend, x1, y0, y1, height) {
  const half = height / 2, turn = (x0 + bend) / 2;
  const there = `M${x0},${y0 - half}C${turn},${y0 - half} ${turn},${y1 - half} ${bend},${y1 - half}H${x1}V${y1 + half}`;
  return `${there}H${bend}C${turn},${y1 + half} ${turn},${y0 + half} ${x0},${y0 + half}Z`;
}

// Rollouts from top to bottom: subtrees stay together, the better ones above.
function laneOrder(group) {
  const { value, parent } = group.nodes, out = [];
  const visit = (v) => {
    const parts = group.children[v].map((child) => [value[child], () => visit(child)]);
    for (const row of group.rows) if (row.leaf === v) parts.push([row.reward, () => out.push(row)]);
    parts.sort((a, b) => b[0] - a[0]).forEach(([, go]) => go());
  };
  parent.forEach((p, v) => p < 0 && visit(v));
  return out;
}

// Positions to [0, 1]: between two events a stretch takes room by the logarithm of its tokens.
function warped(group) {
  const { depth, length } = group.nodes, starts = new Set(depth);
  const events = [...new Set([0, ...depth, ...depth.map((d, v) => d + length[v])])].sort((a, b) => a - b);
  const places = [0];
  for (let i = 1; i < events.length; i++) {
    const tokens = events[i] - events[i - 1], bend = starts.has(events[i - 1]) ? 2.5 : 0.2;
    places.push(places[i - 1] + Math.log2(1 + tokens) + bend);
  }
  const total = places.at(-1) || 1;
  return {
    least: Math.min(events.length, 160) * 9,
    at(position) {
      const i = events.findLastIndex((event) => event <= position);
      if (i === events.length - 1) return places[i] / total;
      const share = (position - events[i]) / (events[i + 1] - events[i]);
      return (places[i] + share * (places[i + 1] - places[i])) / total;
    },
    ticks(x) {
      const out = [];
      for (const event of events) if (!out.length || x(event) - x(out.at(-1)) > 44) out.push(event);
      return out;
    },
  };
}

function oneLine(text) {
  return text.replace(/\n/g, "↵").replace(/\s+/g, " ");
}

function sign(x, middle) {
  return x > middle ? "up" : x < middle ? "down" : "";
}

function stretch(group, v) {
  const { depth, length } = group.nodes;
  return length[v] ? `Tokens ${whole(depth[v] + 1)} to ${whole(depth[v] + length[v])}` : "Before the first token";
}

function nodeLabel(group, v) {
  const { count, value, before } = group.nodes;
  const values = `value ${plain(value[v])}, before ${plain(before[v])}`;
  return `${stretch(group, v)}, ${count[v]} of ${group.rows.length} rollouts, ${values}`;
}

function nodeNumbers(group, v) {
  const { count, value, before } = group.nodes;
  const line = (name, field, text) =>
    el("tr", {}, el("th", { scope: "row" }, name), el("td", { "data-field": field }, text));
  return el("table", {}, line("rollouts", "count", `${count[v]} of ${group.rows.length}`),
    line("value before, after", "value", `${plain(before[v])} → ${plain(value[v])}`));
}
