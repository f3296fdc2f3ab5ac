// The prefix tree as a river: a lane per rollout, a band per node as thick as the rollouts in it.
// Distances along it are logarithmic between events, so that long runs without a branch do not drown the branches.

const GUTTER = 176;

function treePicture(group, choose) {
  const lanes = laneOrder(group), rows = group.rows.length;
  const pitch = Math.max(7, Math.min(22, 560 / rows)), thick = Math.min(9, pitch * 0.55);
  const warp = warped(group);
  const width = Math.max(720, document.getElementById("main").clientWidth - 2 * parseFloat(getComputedStyle(document.getElementById("main")).paddingLeft));
  const x = (position) => 14 + warp.at(position) * Math.max(warp.least, width - GUTTER - 22);
  const full = x(warp.last) + GUTTER, height = rows * pitch + 44;
  const svg = draw("svg", { width: full, height, viewBox: `0 0 ${full} ${height}`, role: "group", "aria-label": `Prefix tree of ${rows} rollouts` });
  const { parent, depth, length, count, value } = group.nodes;
  const middle = parent.map(() => 0), offset = parent.map(() => 0);
  const inside = parent.map(() => []);
  lanes.forEach((row, lane) => row.path.forEach((v) => inside[v].push(lane)));
  inside.forEach((own, v) => (middle[v] = 20 + (own.reduce((a, b) => a + b, 0) / own.length + 0.5) * pitch));
  const range = span(group.rows.map((row) => row.reward), value[0]);

  for (const tick of warp.ticks(x)) svg.append(draw("text", { x: x(tick), y: height - 4, "text-anchor": "middle" }, whole(tick)));
  for (const [at, name] of [[12, "rollout"], [98, "reward"], [152, "length"]])
    svg.append(draw("text", { x: full - GUTTER + at, y: 9, "text-anchor": at === 12 ? "start" : "end" }, name));
  lanes.forEach((row, lane) => svg.append(draw("line", { class: "leader", x1: x(row.length) + 6, x2: full - GUTTER + 6, y1: ends(lane), y2: ends(lane) })));

  const bands = draw("g"), tags = draw("g"), paths = [];
  // A child leaves its parent's band at the slice of its own rollouts.
  const order = (v) => inside[v][0];
  parent.forEach((p, v) => {
    const before = p < 0 ? 0 : inside[p].filter((lane) => lane < order(v)).length;
    offset[v] = p < 0 ? middle[v] : middle[p] + (before + count[v] / 2 - count[p] / 2) * thick;
  });
  parent.forEach((p, v) => {
    const x0 = x(depth[v]), x1 = Math.max(x(depth[v] + length[v]), x0 + (p < 0 ? 3 : 1)), bend = x0 + Math.min(44, (x1 - x0) * 0.75);
    const d = flow(p < 0 ? x0 - 6 : x0, p < 0 ? x1 : bend, x1 + 0.5, offset[v], middle[v], count[v] * thick);
    const band = draw("path", { class: "node", d, style: `fill:${mixed(value[v], range)}`, tabindex: v ? -1 : 0, role: "button", "aria-pressed": "false", "aria-label": nodeLabel(group, v), "data-node": v });
    band.addEventListener("pointerenter", () => { highlight(v); showNode(v); });
    band.addEventListener("pointerleave", () => { highlight(chosen); hideCard(); });
    band.addEventListener("focus", () => showNode(v));
    band.addEventListener("blur", hideCard);
    band.addEventListener("click", () => choose(v));
    band.addEventListener("keydown", (event) => walk(event, v));
    bands.append(band);
    paths[v] = band;
    label(v, p < 0 ? x0 : bend, x1, middle[v]);
  });
  svg.append(bands, tags);
  lanes.forEach((row, lane) => svg.append(endLabel(row, lane)));

  let chosen = null;
  function ends(lane) { return middle[lanes[lane].leaf] + (inside[lanes[lane].leaf].indexOf(lane) + 0.5 - inside[lanes[lane].leaf].length / 2) * (isEnd(lanes[lane].leaf) ? thick : pitch); }
  function isEnd(v) { return group.children[v].length === 0 && count[v] === 1; }

  function endLabel(row, lane) {
    const y = 20 + (lane + 0.5) * pitch, at = full - GUTTER + 12, small = pitch < 13 ? `font-size:${(pitch * 0.85).toFixed(1)}px` : null;
    const text = draw("text", { x: at, y: y + 4, style: small }, `${row.number + 1}`);
    text.append(draw("tspan", { x: at + 86, "text-anchor": "end", class: sign(row.reward, value[0]) }, plain(row.reward)));
    text.append(draw("tspan", { x: at + 140, "text-anchor": "end", class: "dim" }, whole(row.length)));
    const link = draw("a", { href: `#${group.index}-${row.number}`, "data-row": row.number, "aria-label": `Rollout ${row.number + 1}, reward ${plain(row.reward)}, ${row.length} tokens` }, text);
    link.addEventListener("click", (event) => { event.preventDefault(); choose(null, row.number); });
    link.addEventListener("pointerenter", () => highlight(row.leaf, lane));
    link.addEventListener("pointerleave", () => highlight(chosen));
    return link;
  }

  function label(v, from, to, y) {
    const room = to - from;
    if (count[v] * thick >= 15 && room > 34) tags.append(draw("text", { class: `inside ${strength(value[v], range) > 0.45 ? "strong" : ""}`, x: from + 5, y: y + 4 }, plain(value[v])));
    if (parent[v] < 0 || pitch < 16 || room < 30) return;
    const most = Math.floor(room / 6.4), whole = group.nodeTexts(v, 24).join("").replace(/\n/g, "↵").replace(/\s+/g, " ");
    const text = whole.length > most ? `${whole.slice(0, most - 1).trimEnd()}…` : whole;
    tags.append(draw("text", { class: "tag", x: from + 3, y: y - (count[v] * thick) / 2 - 2.5 }, text));
  }

  function showNode(v) {
    const text = group.nodeTexts(v, 60).join("").slice(0, 240);
    const place = `tokens ${whole(depth[v] + 1)} to ${whole(depth[v] + length[v])}`;
    const named = el("div", { class: "token" }, text || "(nothing in common)");
    showCard(paths[v], [named, el("div", { class: "place" }, place), nodeNumbers(group, v)], svg.parentElement.getBoundingClientRect().left);
  }

  function highlight(v, lane = null) {
    const keep = v === null ? null : new Set(lineage(v));
    paths.forEach((band, u) => band.classList.toggle("off", keep !== null && !keep.has(u) && !(lane === null && below(u, v))));
    for (const link of svg.querySelectorAll("a")) {
      const row = group.rows[link.dataset.row];
      link.classList.toggle("off", v !== null && (lane === null ? !row.path.includes(v) : lanes[lane] !== row));
    }
  }

  function lineage(v) { const out = []; for (; v >= 0; v = parent[v]) out.push(v); return out; }
  function below(u, v) { for (; u >= 0; u = parent[u]) if (u === v) return true; return false; }

  function walk(event, v) {
    const siblings = (parent[v] < 0 ? [v] : group.children[parent[v]]).toSorted((a, b) => order(a) - order(b));
    const move = { ArrowLeft: parent[v], ArrowRight: group.children[v].toSorted((a, b) => order(a) - order(b))[0],
      ArrowUp: siblings[siblings.indexOf(v) - 1], ArrowDown: siblings[siblings.indexOf(v) + 1] }[event.key];
    if (event.key === "Enter" || event.key === " ") choose(v);
    else if (!event.key.startsWith("Arrow")) return;
    else if (move !== undefined && move >= 0) {
      paths[v].setAttribute("tabindex", -1);
      paths[move].setAttribute("tabindex", 0);
      paths[move].focus();
    }
    event.preventDefault();
    event.stopPropagation();
  }

  return { svg, lanes, range, mark(v) {
    chosen = v;
    paths.forEach((band, u) => band.setAttribute("aria-pressed", String(u === v)));
    highlight(v);
  } };
}

// A band of even height: from y0 it bends to y1 until `bend`, then runs on to x1.
function flow(x0, bend, x1, y0, y1, height) {
  const middle = (x0 + bend) / 2, h = height / 2;
  return `M${x0},${y0 - h}C${middle},${y0 - h} ${middle},${y1 - h} ${bend},${y1 - h}H${x1}V${y1 + h}H${bend}C${middle},${y1 + h} ${middle},${y0 + h} ${x0},${y0 + h}Z`;
}

// Rollouts from top to bottom: subtrees stay together, the better ones above.
function laneOrder(group) {
  const { value } = group.nodes, out = [];
  const visit = (v) => {
    const parts = group.children[v].map((child) => ({ value: value[child], go: () => visit(child) }));
    for (const row of group.rows) if (row.leaf === v) parts.push({ value: row.reward, go: () => out.push(row) });
    parts.sort((a, b) => b.value - a.value).forEach((part) => part.go());
  };
  group.nodes.parent.forEach((p, v) => p < 0 && visit(v));
  return out;
}

// Positions to [0, 1]: between two events a stretch takes room by the logarithm of its tokens.
function warped(group) {
  const { depth, length, count } = group.nodes;
  const starts = new Set(depth), events = [...new Set([0, ...depth, ...depth.map((d, v) => d + length[v])])].sort((a, b) => a - b);
  const places = [0];
  for (let i = 1; i < events.length; i++) places.push(places[i - 1] + Math.log2(1 + events[i] - events[i - 1]) + (starts.has(events[i - 1]) ? 2.5 : 0.2));
  const total = places.at(-1) || 1;
  return {
    last: events.at(-1), least: Math.min(events.length, 160) * 9,
    at(position) {
      let i = events.findLastIndex((e) => e <= position);
      if (i === events.length - 1) return places[i] / total;
      const share = (position - events[i]) / (events[i + 1] - events[i]);
      return (places[i] + share * (places[i + 1] - places[i])) / total;
    },
    ticks(x) {
      const out = [];
      for (const e of events) if (!out.length || x(e) - x(out.at(-1)) > 44) out.push(e);
      return out;
    },
  };
}

function sign(x, middle) {
  return x > middle ? "up" : x < middle ? "down" : "";
}

function nodeLabel(group, v) {
  const { count, value, before, depth, length } = group.nodes;
  return `Tokens ${depth[v] + 1} to ${depth[v] + length[v]}, ${count[v]} of ${group.rows.length} rollouts, value ${plain(value[v])}, before ${plain(before[v])}`;
}

function nodeNumbers(group, v) {
  const { count, value, before } = group.nodes;
  const line = (name, field, text) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { "data-field": field }, text));
  return el("table", {}, line("rollouts", "count", `${count[v]} of ${group.rows.length}`), line("value before, after", "value", `${plain(before[v])} → ${plain(value[v])}`));
}
