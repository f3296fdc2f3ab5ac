// Small builders of elements, and the card that shows numbers beside what is pointed at. Text is only ever set as text.

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== undefined) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const card = document.getElementById("card");

let anchor = null;

// Shows the content beside an element, and keeps it there while the page scrolls; `least` is its leftmost edge.
function showCard(beside, content, least = 8) {
  anchor = { beside, least };
  card.replaceChildren(...content);
  card.hidden = false;
  placeCard();
}

function placeCard() {
  if (card.hidden) return;
  const rect = anchor.beside.getBoundingClientRect(), { offsetWidth: width, offsetHeight: height } = card;
  if (!anchor.beside.isConnected || rect.bottom < 48 || rect.top > innerHeight) return hideCard();
  const left = Math.max(anchor.least, Math.min(rect.left, innerWidth - width - 8));
  const below = rect.bottom + 10;
  const top = below + height < innerHeight ? below : Math.max(8, rect.top - height - 10);
  card.style.left = `${left}px`;
  card.style.top = `${top}px`;
}

function hideCard() {
  card.hidden = true;
}

function say(text) {
  document.getElementById("said").textContent = text;
}

// The numbers of one token under every method.
function tokenCard(group, row, position) {
  const token = row.begin + position, r = row.number;
  const v = group.nodeAt(row, position), { value, before, depth } = group.nodes;
  const branch = group.flags(METHODS[0], row, position) & BRANCH;
  const first = depth[v] === position;
  const heading = (name) => el("th", { scope: "row" }, name);
  const shared = (name, field, text) => el("tr", {}, heading(name), el("td", { "data-field": field, colspan: METHODS.length }, text ?? "–"));
  const each = (name, field, get) => el("tr", {}, heading(name),
    ...METHODS.map((m) => el("td", { "data-field": field, "data-method": m }, get(group.methods[m], m) ?? "–")));
  const was = first ? before[v] : value[v];
  const span = (own) => {
    const low = own.low.text(r, token), high = own.high.text(r, token);
    return low === null && high === null ? null : `${low ?? "0"} … ${high ?? "∞"}`;
  };
  const clip = (own, m) => {
    const flags = group.flags(m, row, position);
    return flags & STOPPED ? "stopped" : flags & BOUNDED ? "bounded" : flags & TRAINS ? "no" : "not trained";
  };
  const names = METHODS.length > 1 ? el("tr", { class: "names" }, el("td"), ...METHODS.map((m) => el("th", { scope: "col" }, m))) : null;
  const table = el("table", {},
    el("tbody", {}, shared("log-prob", "log_prob", group.logProb.text(r, token)),
      shared("value before, after", "value", `${branch ? "branch, " : ""}${plain(was)} → ${plain(value[v])}`), names, each("advantage", "advantage", (own) => own.advantage.text(r, token)),
      each("ratio", "ratio", (own) => own.ratio.text(r, token)), each("window", "window", span),
      each("weight", "weight", (own) => own.weight.text(r, token)), each("clipped", "clipped", clip)));
  const text = group.word(row, position);
  return [el("div", { class: "token" }, text.trim() ? text : `“${text.replace(/\n/g, "↵")}”`),
    el("div", { class: "place" }, `token ${position + 1} of ${row.length}, rollout ${r + 1}`), table];
}

function plain(x) {
  return x === null ? "–" : shown(x, 3);
}
