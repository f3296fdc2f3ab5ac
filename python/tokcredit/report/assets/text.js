// Rollouts as text, with tokens coloured by their advantages. Elements exist only where they are seen.

const PIECE = 220, FOLD = 340, LINE = 13 * 1.72, STRIP = 18;

// Spans of at most about 220 tokens from `first` to `last`, cut at `edges`, and after line breaks where there are any.
function pieces(texts, first, last, edges) {
  const out = [];
  let begin = first, broken = first;
  for (let i = first; i < last; i++) {
    if (edges.has(i) && i > begin) {
      out.push([begin, i]);
      begin = i;
    }
    if (texts[i].includes("\n")) broken = i + 1;
    if (i + 1 - begin < PIECE) continue;
    const end = broken > begin ? broken : i + 1;
    out.push([begin, end]);
    begin = end;
  }
  if (begin < last || !out.length) out.push([begin, last]);
  return out;
}

const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) isIntersecting ? target.fill() : target.empty();
}, { rootMargin: "900px 0px" });

// A rollout from token `begin` to `end`, which has a name if it is only a part.
class RolloutText {
  constructor(page, group, row, begin, end, name) {
    Object.assign(this, { page, group, row, begin, end, name, cursor: null, hits: new Set() });
    this.texts = group.texts(row);
    this.cuts = pieces(this.texts, begin, end, new Set(row.turns.flatMap((turn) => [turn.begin, turn.end])));
    this.longest = Math.max(...group.rows.map((r) => r.length));
    this.article = this.frame();
    this.fold(true);
  }

  frame() {
    const { row, group } = this, reward = plain(row.reward), length = whole(this.end - this.begin);
    const branches = this.texts.reduce((n, _, i) => n + (this.holds(i) && this.isBranch(i) ? 1 : 0), 0);
    const title = this.name ?? `Rollout ${row.number + 1}`, turns = row.turns.length;
    const fold = () => this.fold(!this.article.classList.contains("folded"));
    this.button = el("button", { type: "button", hidden: this.end - this.begin <= FOLD, onclick: fold });
    this.canvas = el("canvas", { "aria-hidden": "true", onclick: ({ offsetX }) => {
      const position = Math.floor((offsetX / this.canvas.clientWidth) * this.longest);
      this.page.move(this, Math.max(this.begin, Math.min(this.end - 1, position)));
    } });
    this.about = el("span", {});
    this.columns = el("div", { class: "texts" });
    const isCommon = this.name === COMMON, label = `${title}${isCommon ? "" : `, reward ${reward}`}, ${length} tokens`;
    return el("article", { tabindex: 0, "aria-label": label, "data-row": row.number, "data-part": this.name,
      onfocus: () => (this.page.current = this),
      onpointerover: ({ target }) =>
        target.position !== undefined && showCard(target, tokenCard(group, row, target.position)),
      onpointerout: hideCard,
      onclick: ({ target }) =>
        target.position !== undefined && getSelection().isCollapsed && this.page.move(this, target.position) },
    el("header", {}, el("b", {}, title),
      isCommon ? null : el("span", {}, "reward ", el("b", { class: sign(row.reward, group.nodes.value[0]) }, reward)),
      el("span", {}, `${length} tokens`), el("span", {}, `${branches} branch ${branches === 1 ? "token" : "tokens"}`),
      turns ? el("span", {}, `${turns} ${turns === 1 ? "turn" : "turns"}`) : null,
      this.about, this.button),
    this.canvas, this.columns);
  }

  // Text columns for these methods.
  show(methods) {
    for (const piece of this.columns.querySelectorAll(".text > div")) seen.unobserve(piece);
    const several = methods.length > 1;
    this.columns.replaceChildren(...methods.map((m) => el("div", {}, several ? el("h4", {}, m) : null,
      el("div", { class: "text" }, ...this.cuts.flatMap(([begin, end]) =>
        [turnHeading(this.page, this.row, begin), this.piece(m, begin, end), ...answerText(this.row, end)])))));
    this.about.textContent = this.name === COMMON ? "coloured as in the chosen response" : methods.map((m) => {
      const { median, score, has_gradient: hasGradient } = this.group.methods[m], { number } = this.row;
      const none = hasGradient[number] ? "" : ", no gradient";
      const [name, figure] = score ? ["score", score] : ["median advantage", median];
      return `${several ? m : name} ${plain(figure[number])}${none}`;
    }).join(" · ");
  }

  piece(method, begin, end) {
    const kind = isAnswer(this.row, begin) ? "answer" : null;
    const piece = el("div", { class: kind, "data-begin": begin, "data-method": method });
    const texts = this.texts.slice(begin, end);
    const characters = texts.reduce((n, text) => n + text.length, 0);
    const breaks = texts.filter((text) => text.includes("\n")).length;
    // A guess until it is built, so that the page is as long as it will be.
    piece.style.minHeight = `${Math.max(1, Math.ceil(characters / 110) + breaks * 0.6) * LINE}px`;
    piece.fill = () => {
      if (piece.firstChild) return;
      piece.append(...texts.map((text, i) => this.token(method, begin + i, text)));
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

  advantage(method, position) {
    return this.group.methods[method].advantage.number(this.row.number, this.row.begin + position);
  }

  // The number that colours a token.
  colour(method, position) {
    const column = this.group.methods[method][this.page.colourOf(method)];
    return column.number(this.row.number, this.row.begin + position);
  }

  holds(position) {
    return this.begin <= position && position < this.end;
  }

  token(method, position, text) {
    const flags = this.group.flags(method, this.row, position);
    const kinds = [shade(this.colour(method, position), this.page.scale(method)), flags & BARRIER && "barrier",
      flags & BRANCH && "branch", flags & (CLIPPED | BOUNDED) && "clipped", !(flags & TRAINS) && "outside",
      this.hits.has(position) && "hit", this.cursor === position && "cursor"];
    const span = el("span", { class: kinds.filter(Boolean).join(" ") }, text.replace(/\n/g, "↵\n"));
    span.position = position;
    return span;
  }

  redraw() {
    for (const piece of this.columns.querySelectorAll(".text > div")) {
      if (!piece.firstChild) continue;
      piece.replaceChildren();
      piece.fill();
    }
  }

  // Puts the cursor on a token: unfolds, scrolls there if need be and shows its numbers.
  async reveal(position, method) {
    this.cursor = position;
    this.fold(false);
    const [begin] = this.cuts.findLast(([b]) => b <= position);
    const piece = this.columns.querySelector(`[data-begin="${begin}"][data-method="${CSS.escape(method)}"]`);
    piece.fill();
    this.redraw();
    const { top, bottom } = piece.children[position - begin].getBoundingClientRect();
    if (top < 150 || bottom > innerHeight - 230) piece.children[position - begin].scrollIntoView({ block: "center" });
    await new Promise(requestAnimationFrame);
    showCard(piece.children[position - begin] ?? piece, tokenCard(this.group, this.row, position));
    say([this.texts[position], ...METHODS.map((m) => `${m} ${plain(this.advantage(m, position))}`)].join(", "));
  }

  leave() {
    if (this.cursor === null) return;
    this.cursor = null;
    this.redraw();
  }

  fold(folded) {
    if (this.end - this.begin <= FOLD) return;
    this.article.classList.toggle("folded", folded);
    this.button.textContent = folded ? `Show all ${whole(this.end - this.begin)} tokens` : "Fold";
    this.button.setAttribute("aria-expanded", String(!folded));
  }

  // Finds the tokens that hold the text, however it is cut into tokens.
  search(wanted) {
    this.hits.clear();
    if (wanted) {
      const starts = [];
      this.texts.reduce((at, text) => (starts.push(at), at + text.length), 0);
      const all = this.texts.join("").toLowerCase();
      let token = 0;
      for (let at = all.indexOf(wanted); at >= 0; at = all.indexOf(wanted, at + wanted.length)) {
        while (token + 1 < starts.length && starts[token + 1] <= at) token++;
        for (let i = token; i < starts.length && starts[i] < at + wanted.length; i++)
          if (this.holds(i)) this.hits.add(i);
      }
    }
    this.redraw();
  }

  find(from, direction, wanted) {
    for (let i = from + direction; this.holds(i); i += direction) if (wanted(i)) return i;
    return null;
  }

  isBranch(position) {
    return this.group.flags(METHODS[0], this.row, position) & BRANCH;
  }

  // The whole rollout as a strip, on the scale of the longest, with a tick at every branch token.
  strip(method) {
    const { canvas, row } = this, width = canvas.clientWidth, dense = devicePixelRatio || 1;
    if (!width) return;
    canvas.width = width * dense;
    canvas.height = STRIP * dense;
    const pen = canvas.getContext("2d"), unit = width / this.longest, colours = new Map();
    const scale = this.page.scale(method);
    pen.scale(dense, dense);
    for (let i = this.begin; i < this.end; i++) {
      const x = this.colour(method, i), key = shade(x, scale);
      if (!key) continue;
      if (!colours.has(key)) colours.set(key, paint(x, scale));
      pen.fillStyle = colours.get(key);
      pen.fillRect(i * unit, 5, Math.max(unit, 0.7), STRIP - 5);
    }
    pen.fillStyle = getComputedStyle(canvas).color;
    for (let i = this.begin; i < this.end; i++) if (this.isBranch(i)) pen.fillRect(i * unit, 0, 1.2, STRIP);
    pen.globalAlpha = 0.25;
    pen.fillRect(this.begin * unit, STRIP - 1, (this.end - this.begin) * unit, 1);
  }
}
