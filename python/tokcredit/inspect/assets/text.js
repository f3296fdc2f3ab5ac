// Rollouts as text: tokens coloured by what they are paid, built only where they are seen.

const PIECE = 220, FOLD = 340, LINE = 13 * 1.72;

// Pieces of at most about 220 tokens, cut after line breaks where there are any.
function pieces(texts) {
  const out = [];
  let begin = 0, broken = 0;
  for (let i = 0; i < texts.length; i++) {
    if (texts[i].includes("\n")) broken = i + 1;
    if (i + 1 - begin < PIECE) continue;
    const cut = broken > begin ? broken : i + 1;
    out.push([begin, cut]);
    begin = cut;
  }
  if (begin < texts.length || !out.length) out.push([begin, texts.length]);
  return out;
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) entry.isIntersecting ? entry.target.fill() : entry.target.empty();
}, { rootMargin: "900px 0px" });

class RolloutText {
  constructor(group, row) {
    this.group = group;
    this.row = row;
    this.texts = group.texts(row);
    this.cuts = pieces(this.texts);
    this.hits = new Set();
    this.cursor = null;
  }

  // One column of text for a method.
  column(method) {
    const box = el("div", { class: "text" });
    box.append(...this.cuts.map(([begin, end]) => this.piece(method, begin, end)));
    return box;
  }

  piece(method, begin, end) {
    const piece = el("div", { "data-begin": begin, "data-method": method });
    const characters = this.texts.slice(begin, end).reduce((n, text) => n + text.length, 0);
    const breaks = this.texts.slice(begin, end).filter((text) => text.includes("\n")).length;
    piece.style.minHeight = `${Math.max(1, Math.ceil(characters / 110) + breaks * 0.6) * LINE}px`;
    piece.fill = () => {
      if (piece.firstChild) return;
      piece.append(...this.texts.slice(begin, end).map((text, i) => this.token(method, begin + i, text)));
      piece.style.minHeight = "";
    };
    piece.empty = () => {
      if (!piece.firstChild) return;
      piece.style.minHeight = `${piece.offsetHeight}px`;
      piece.replaceChildren();
    };
    seen.observe(piece);
    return piece;
  }

  token(method, position, text) {
    const { group, row } = this, flags = group.flags(method, row, position);
    const paid = group.methods[method].advantage.number(row.number, row.begin + position);
    const kinds = [shade(paid, HEADER.summary.methods[method].scale)];
    if (flags & BRANCH) kinds.push("branch");
    if (flags & (STOPPED | BOUNDED)) kinds.push("stopped");
    if (!(flags & TRAINS)) kinds.push("outside");
    if (this.hits.has(position)) kinds.push("hit");
    if (this.cursor === position) kinds.push("cursor");
    const span = el("span", { class: kinds.filter(Boolean).join(" ") }, text.replace(/\n/g, "↵\n"));
    span.position = position;
    return span;
  }

  redraw() {
    for (const piece of this.article.querySelectorAll(".text > div")) {
      if (!piece.firstChild) continue;
      piece.replaceChildren();
      piece.fill();
    }
  }

  // Unfolds as needed, scrolls to the token and shows its numbers.
  async reveal(position, method) {
    this.cursor = position;
    this.fold(false);
    const [begin] = this.cuts.findLast(([b]) => b <= position);
    const piece = this.article.querySelector(`.text > div[data-begin="${begin}"][data-method="${CSS.escape(method)}"]`);
    piece.fill();
    this.redraw();
    const span = piece.children[position - begin], box = span.getBoundingClientRect();
    if (box.top < 150 || box.bottom > innerHeight - 230) span.scrollIntoView({ block: "center" });
    await new Promise(requestAnimationFrame);
    showCard(piece.children[position - begin] ?? piece, tokenCard(this.group, this.row, position));
    say(`${this.texts[position]}, ${METHODS.map((m) => `${m} ${this.group.methods[m].advantage.text(this.row.number, this.row.begin + position)}`).join(", ")}`);
  }

  fold(folded) {
    if (this.texts.length <= FOLD) return;
    this.article.classList.toggle("folded", folded);
    this.button.textContent = folded ? `Show all ${whole(this.texts.length)} tokens` : "Fold";
    this.button.setAttribute("aria-expanded", String(!folded));
  }

  search(wanted) {
    this.hits.clear();
    if (!wanted) return;
    const starts = [];
    let at = 0;
    for (const text of this.texts) { starts.push(at); at += text.length; }
    const all = this.texts.join("").toLowerCase();
    let token = 0;
    for (let found = all.indexOf(wanted); found >= 0; found = all.indexOf(wanted, found + wanted.length)) {
      while (token + 1 < starts.length && starts[token + 1] <= found) token++;
      for (let i = token; i < starts.length && starts[i] < found + wanted.length; i++) this.hits.add(i);
    }
  }

  step(from, direction, wanted) {
    for (let i = from + direction; i >= 0 && i < this.texts.length; i += direction) if (wanted(i)) return i;
    return null;
  }

  isBranch(position) {
    return this.group.flags(METHODS[0], this.row, position) & BRANCH;
  }

  // The whole rollout as a strip: a column of pixels per token or per few, branches as ticks above.
  strip(method) {
    const canvas = this.canvas, width = canvas.clientWidth, ratio = devicePixelRatio || 1;
    if (!width) return;
    canvas.width = width * ratio;
    canvas.height = 18 * ratio;
    const pen = canvas.getContext("2d"), { row, group } = this, longest = Math.max(...group.rows.map((r) => r.length));
    pen.scale(ratio, ratio);
    const unit = width / longest, scale = HEADER.summary.methods[method].scale, ink = getComputedStyle(canvas).color;
    const colours = new Map();
    for (let i = 0; i < row.length; i++) {
      const paid = group.methods[method].advantage.number(row.number, row.begin + i), key = shade(paid, scale);
      if (key) {
        if (!colours.has(key)) colours.set(key, paint(paid, scale));
        pen.fillStyle = colours.get(key);
        pen.fillRect(i * unit, 5, Math.max(unit, 0.7), 13);
      }
    }
    pen.fillStyle = ink;
    for (let i = 0; i < row.length; i++) if (this.isBranch(i)) pen.fillRect(i * unit, 0, 1.2, 18);
    pen.globalAlpha = 0.25;
    pen.fillRect(0, 17, row.length * unit, 1);
  }
}
