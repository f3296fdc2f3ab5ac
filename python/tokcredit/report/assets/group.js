// One prompt: its prefix tree, and its rollouts with filters.

class GroupPage {
  constructor(group) {
    this.group = group;
    this.method = GroupPage.method ?? METHODS[0];
    this.node = null;
    this.wanted = "";
    this.current = null;
    this.pair = pairParts(group);
    const parts = this.pair ?? group.rows.map((row) => [row, 0, row.length, null]);
    this.texts = parts.map((part) => new RolloutText(this, group, ...part));
    this.tree = treePicture(group, (v) => this.choose(v), (number) => this.go(number));
    this.chosen = el("div", { class: "chosen", hidden: true });
    this.count = el("small", { class: "count", role: "status" });
    this.form = toolBar(this);
    this.legend = el("div", { class: "legend row" });
    this.list = el("div", { class: this.pair && "pair" }, ...this.texts.map((text) => text.article));
  }

  get methods() {
    return this.method === "all" ? METHODS : [this.method];
  }

  render() {
    const { prompt, rows, nodes, index } = this.group, [low, middle, high] = this.tree.range;
    const entry = HEADER.prompts.findIndex((p) => p.group === index);
    const place = [`Prompt ${entry + 1} of ${HEADER.prompts.length}`, `${rows.length} rollouts`,
      `mean reward ${plain(nodes.value[0])}`, HEADER.prompts[entry].differ ? null : "all rewards are equal"];
    const view = el("div", {},
      el("p", { class: "crumb" }, place.filter(Boolean).join(" · ")),
      el("h1", { class: "prompt", tabindex: prompt.length > 700 ? 0 : null }, prompt || "(no prompt in the file)"),
      el("h2", {}, "Where responses branch"),
      el("div", { class: "row" },
        el("p", { class: "muted" }, "A band is a run of tokens that several rollouts share; its height is their number. " +
          "Click a band to show only its rollouts."),
        el("p", { class: "scale" }, plain(low), el("i", { class: "values" }), plain(high),
          el("span", {}, `mean reward of a band's rollouts, grey at ${plain(middle)}`))),
      el("div", { class: "tree" }, this.tree.svg), this.chosen,
      el("h2", {}, "Rollouts ", this.count), this.form, this.legend, this.list);
    this.sort("tree");
    if (this.form.elements.colour) this.form.elements.colour.value = GroupPage.colour ?? "advantage";
    this.use(this.method);
    return view;
  }

  // Shows the advantages of a method, or of all methods side by side.
  use(method) {
    this.method = GroupPage.method = method;
    for (const button of this.form.querySelectorAll("[data-method]"))
      button.setAttribute("aria-pressed", String(button.dataset.method === method));
    for (const text of this.texts) text.show(this.methods);
    this.legend.replaceChildren(...legend(this, this.methods[0]));
    requestAnimationFrame(() => this.strips());
    this.filter();
  }

  // Colours tokens by their weight or by their log-ratio.
  colourBy(name) {
    GroupPage.colour = name;
    this.use(this.method);
  }

  // The column that colours tokens under a method, and its number of the strongest colour.
  colourOf(method) {
    return hasMargin(method) ? (GroupPage.colour ?? "advantage") : "advantage";
  }

  scale(method) {
    return HEADER.summary.methods[method][this.colourOf(method) === "log_ratio" ? "log_ratio_scale" : "scale"];
  }

  strips() {
    for (const text of this.texts) text.strip(this.methods[0]);
  }

  // Keeps the rollouts through a node, or all of them again.
  choose(v) {
    this.node = this.node === v ? null : v;
    this.tree.mark(this.node);
    this.chosen.hidden = this.node === null;
    if (this.node !== null) {
      const passed = this.group.rows.filter((row) => row.path.includes(v)).map((row) => row.number + 1);
      this.chosen.replaceChildren(
        el("div", { class: "row" }, el("b", {}, stretch(this.group, v)),
          el("span", { class: "muted" }, `in rollouts ${passed.join(", ")}`),
          el("button", { type: "button", onclick: () => this.choose(v) }, "Show all rollouts")),
        el("pre", { tabindex: 0 }, this.group.nodeTexts(v).join("") || "(no common token)"));
    }
    this.filter();
  }

  // Hides what does not pass; `searched` when the wanted text may have changed.
  filter(searched = false) {
    const passes = passing(this.form, this.group, this.methods);
    if (searched) {
      this.wanted = this.form.elements.search.value.toLowerCase();
      for (const text of this.texts) text.search(this.wanted);
    }
    for (const { article, row, hits } of this.texts) {
      const through = this.node === null || row.path.includes(this.node);
      article.hidden = !(through && passes(row) && (!this.wanted || hits.size > 0));
    }
    const rows = new Set(this.visible.map((text) => text.row)), margin = marginText(this.group, this.methods);
    this.count.textContent = [`${rows.size} of ${this.group.rows.length}`, margin].filter(Boolean).join(" · ");
  }

  sort(by) {
    if (this.pair) return;
    const { lanes } = this.tree;
    const rank = { tree: (row) => lanes.indexOf(row), number: (row) => row.number, reward: (row) => -row.reward,
      length: (row) => row.length }[by];
    this.texts.sort((a, b) => rank(a.row) - rank(b.row));
    this.list.append(...this.texts.map((text) => text.article));
  }

  get visible() {
    return this.texts.filter((text) => !text.article.hidden);
  }

  // Brings a rollout to the top of the window.
  go(number) {
    const text = this.texts.find((t) => t.row.number === number);
    if (text.article.hidden) this.reset();
    text.article.scrollIntoView({ block: "start" });
    text.article.focus({ preventScroll: true });
  }

  // Puts the cursor on a token of any rollout.
  visit(row, position) {
    this.go(row.number);
    this.move(this.texts.find((text) => text.row === row && position < text.end), position);
  }

  next(direction) {
    const among = this.visible, at = among.indexOf(this.current);
    const to = among[at < 0 ? 0 : Math.max(0, Math.min(among.length - 1, at + direction))];
    if (to) this.go(to.row.number);
  }

  // Puts the cursor on a token.
  move(text, position) {
    for (const other of this.texts) if (other !== text) other.leave();
    this.current = text;
    text.article.focus({ preventScroll: true });
    return text.reveal(position, this.methods[0]);
  }

  // The next token in a direction that is wanted.
  token(direction, wanted = () => true) {
    const text = this.visible.includes(this.current) ? this.current : this.visible[0];
    const from = text?.cursor ?? (direction > 0 ? text?.begin - 1 : text?.end);
    const to = text?.find(from, direction, (i) => wanted(text, i));
    if (to !== null && to !== undefined) this.move(text, to);
  }

  turn(direction) {
    this.token(direction, (text, i) => text.row.turns.some(({ begin }) => begin === i));
  }

  branch(direction) {
    this.token(direction, (text, i) => text.isBranch(i));
  }

  async nextHit() {
    const among = this.visible, start = Math.max(0, among.indexOf(this.current));
    const begins = (text) => (i) => text.hits.has(i) && !text.hits.has(i - 1);
    for (let i = 0; i <= among.length; i++) {
      const text = among[(start + i) % among.length];
      const to = text?.find((i ? null : text.cursor) ?? text.begin - 1, 1, begins(text));
      if (to === null || to === undefined) continue;
      await this.move(text, to);
      return this.form.elements.search.focus({ preventScroll: true });
    }
  }

  reset() {
    const by = this.form.elements.order.value;
    this.form.reset();
    this.form.elements.order.value = by;
    if (this.form.elements.colour) this.form.elements.colour.value = GroupPage.colour ?? "advantage";
    if (this.node !== null) this.choose(this.node);
    for (const text of this.texts) text.leave();
    hideCard();
    this.filter(true);
  }
}
