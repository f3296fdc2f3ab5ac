// Builders of elements, and the card with the numbers of the token under the pointer. Text is only ever set as text.

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== null && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(key, value);
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
  const token = row.begin + position, r = row.number, v = group.nodeAt(row, position);
  const { value, before, depth } = group.nodes, branch = group.flags(METHODS[0], row, position) & BRANCH;
  const was = depth[v] === position ? before[v] : value[v];
  const title = (name) => el("th", { scope: "row" }, name);
  const shared = (name, field, text) =>
    el("tr", {}, title(name), el("td", { "data-field": field, colspan: METHODS.length }, text ?? "–"));
  const each = (name, get, text = name) => el("tr", {}, title(text), ...METHODS.map((m) =>
    el("td", { "data-field": name, "data-method": m }, get(group.methods[m], group.flags(m, row, position), m) ?? "–")));
  const number = (name) => each(name, (own) => own[name].text(r, token));
  const ofRatio = (name, get) => each(name, (own, flags, m) => (hasRatio(m) ? get(own, flags) : "not applicable"));
  const bounds = (own) => {
    const low = own.low.text(r, token), high = own.high.text(r, token);
    return low === null && high === null ? null : `${low ?? "0"} … ${high ?? "∞"}`;
  };
  const clip = (own, flags) => {
    if (!(flags & TRAINS)) return "does not train";
    if (own.ratio.text(r, token) === null) return null;
    return flags & CLIPPED ? "no gradient" : flags & BOUNDED ? "ratio bounded" : "inside";
  };
  const names = METHODS.map((m) => el("th", { scope: "col" }, m)), text = group.word(row, position);
  return [
    el("div", { class: "token" }, text.trim() ? text : `“${text.replace(/\n/g, "↵")}”`),
    el("div", { class: "place" }, `token ${position + 1} of ${row.length}, rollout ${r + 1}`),
    el("table", {}, el("tbody", {},
      shared("log-prob", "log_prob", group.logProb.text(r, token)),
      shared("value before, after", "value", `${branch ? "branch, " : ""}${plain(was)} → ${plain(value[v])}`),
      METHODS.length > 1 ? el("tr", { class: "names" }, el("td"), ...names) : null,
      number("advantage"), ofRatio("ratio", (own) => own.ratio.text(r, token)), ofRatio("bounds", bounds),
      number("weight"), ofRatio("clip", clip), ...(METHODS.some(hasMargin) ? [
        each("log_ratio", (own, _, m) => (hasMargin(m) ? own.log_ratio.text(r, token) : "not applicable"), "log-ratio"),
        each("barrier", (own, flags, m) => (hasMargin(m) ? (flags & BARRIER ? "yes" : "no") : "not applicable")),
      ] : []))),
  ];
}

function plain(x) {
  return x === null ? "–" : shown(x, 3);
}
