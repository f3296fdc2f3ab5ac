// One prompt: its tree, and its rollouts with what narrows them down.

class GroupPage {
  constructor(group) {
    this.group = group;
    this.method = GroupPage.method ?? METHODS[0];
    this.node = null;
    this.wanted = "";
    this.texts = group.rows.map((row) => new RolloutText(group, row));
    this.tree = treePicture(group, (v, row) => (v === null ? this.go(row) : this.choose(v)));
    this.current = null;
  }

  get shownMethods() {
    return this.method === "all" ? METHODS : [this.method];
  }

  render() {
    const { group } = this, entry = HEADER.prompts.findIndex((p) => p.group === group.index),  [low, middle, high] = this.tree.range;
    const scale = el("p", { class: "scale" }, plain(low), el("i", { class: "values" }), plain(high), el("span", {}, `mean reward of a band's rollouts, grey at ${plain(middle)}`));
    this.chosen = el("div", { class: "chosen", hidden: true });
    this.count = el("small", { class: "count", role: "status" });
    this.list = el("div", {});
    this.legend = el("div", { class: "legend row" });
    this.view = el("div", {},
      el("p", { class: "crumb" }, `Prompt ${entry + 1} of ${HEADER.prompts.length} · ${group.rows.length} rollouts · mean reward ${plain(group.nodes.value[0])}`, HEADER.prompts[entry].signal ? "" : " · all rewards equal: no signal"),
      el("h1", { class: "prompt", tabindex: group.prompt.length > 700 ? 0 : null }, group.prompt || "(no prompt in the file)"),
      el("h2", {}, "Where rollouts part"),
      el("div", { class: "row" }, el("p", { class: "muted" }, "A band is a run of tokens that its rollouts share, as thick as they are many. Click one to keep its rollouts only."), scale),
      el("div", { class: "tree" }, this.tree.svg), this.chosen,
      el("h2", {}, "Rollouts ", this.count), this.tools(), this.legend, this.list);
    for (const text of this.texts) this.list.append(this.article(text));
    this.sort("tree");
    this.repaint();
    return this.view;
  }

  tools() {
    const longest = Math.max(...this.group.rows.map((r) => r.length));
    const number = (name, label) => el("input", { type: "number", step: "any", name, "aria-label": label, oninput: () => this.filter() });
    const pair = (name, hint) => el("label", {}, hint, number(`${name}-low`, `${hint}, at least`), "–", number(`${name}-high`, `${hint}, at most`));
    const names = METHODS.length > 1 ? [...METHODS, "all"] : METHODS;
    this.switch = el("div", { class: "switch", role: "group", "aria-label": "Method" },
      ...names.map((m) => el("button", { type: "button", "data-method": m, onclick: () => this.use(m) }, m === "all" ? "side by side" : m)));
    this.search = el("input", { type: "search", placeholder: "Search the rollouts", "aria-label": "Search the rollouts", oninput: () => this.filter(true),
      onkeydown: (event) => event.key === "Enter" && this.nextHit() });
    const order = el("select", { "aria-label": "Order", onchange: () => this.sort(order.value) },
      ...[["tree", "tree order"], ["number", "as sampled"], ["reward", "by reward"], ["length", "by length"]].map(([value, text]) => el("option", { value }, text)));
    this.form = el("form", { class: "tools row", onsubmit: (event) => event.preventDefault() }, this.switch, this.search, pair("reward", "reward"), pair("length", "tokens"),
      el("label", {}, "|A| at least", number("paid-low", "largest absolute advantage, at least")), order);
    this.form.querySelector("[name=length-high]").placeholder = longest;
    return this.form;
  }

  article(text) {
    const { row } = text, node = this.group.nodes;
    const branches = Array.from({ length: row.length }, (_, i) => i).filter((i) => text.isBranch(i)).length;
    text.button = el("button", { type: "button", onclick: () => text.fold(!text.article.classList.contains("folded")) });
    text.canvas = el("canvas", { "aria-hidden": "true", onclick: (event) => {
      const longest = Math.max(...this.group.rows.map((r) => r.length));
      this.move(text, Math.min(row.length - 1, Math.floor((event.offsetX / text.canvas.clientWidth) * longest)));
    } });
    text.paid = el("span", {});
    text.columns = el("div", { class: "texts" });
    text.article = el("article", { tabindex: 0, "aria-label": `Rollout ${row.number + 1}, reward ${plain(row.reward)}, ${row.length} tokens`, "data-row": row.number },
      el("header", {}, el("b", {}, `Rollout ${row.number + 1}`), el("span", {}, "reward ", el("b", { class: sign(row.reward, node.value[0]) }, plain(row.reward))),
        el("span", {}, `${whole(row.length)} tokens`), el("span", {}, `${branches} branch ${branches === 1 ? "token" : "tokens"}`), text.paid, row.length > FOLD ? text.button : null),
      text.canvas, text.columns);
    text.article.addEventListener("focus", () => (this.current = text));
    text.article.addEventListener("pointerover", (event) => {
      if (event.target.position === undefined) return;
      showCard(event.target, tokenCard(this.group, row, event.target.position));
    });
    text.article.addEventListener("pointerout", hideCard);
    text.article.addEventListener("click", (event) => event.target.position !== undefined && getSelection().isCollapsed && this.move(text, event.target.position));
    text.fold(true);
    return text.article;
  }

  use(method) {
    this.method = GroupPage.method = method;
    this.repaint();
  }

  repaint() {
    for (const button of this.switch.children) button.setAttribute("aria-pressed", String(button.dataset.method === this.method));
    const shownMethods = this.shownMethods;
    for (const text of this.texts) {
      for (const piece of text.columns.querySelectorAll(".text > div")) seen.unobserve(piece);
      text.columns.replaceChildren(...shownMethods.map((m) => el("div", {}, shownMethods.length > 1 ? el("h4", {}, m) : null, text.column(m))));
      text.paid.textContent = shownMethods.map((m) => `${shownMethods.length > 1 ? `${m} ` : "advantage "}${plain(this.group.methods[m].constant[text.row.number])}${this.group.methods[m].moves[text.row.number] ? "" : ", does not move the policy"}`).join(" · ");
    }
    requestAnimationFrame(() => this.texts.forEach((text) => text.strip(shownMethods[0])));
    const bound = HEADER.summary.methods[shownMethods[0]].scale;
    this.legend.replaceChildren(
      el("p", { class: "scale" }, shown(-bound, 2), el("i", { class: "credit" }), shown(bound, 2), el("span", {}, "advantage of the token")),
      el("p", { class: "text" }, el("span", { class: "branch" }, "branch"), " where rollouts part"), el("p", { class: "text" }, el("span", { class: "stopped" }, "dotted"), " held by the clip"),
      el("p", { class: "text" }, el("span", { class: "outside" }, "grey"), " not trained"));
    this.filter();
  }

  choose(v) {
    const { group } = this, { depth, length } = group.nodes;
    this.node = this.node === v ? null : v;
    this.tree.mark(this.node);
    this.chosen.hidden = this.node === null;
    if (this.node !== null)
      this.chosen.replaceChildren(el("div", { class: "row" }, el("b", {}, `Tokens ${whole(depth[v] + 1)} to ${whole(depth[v] + length[v])}`), el("span", { class: "muted" }, `passed by rollouts ${group.rows.filter((r) => r.path.includes(v)).map((r) => r.number + 1).join(", ")}`),
        el("button", { type: "button", onclick: () => this.choose(v) }, "All rollouts again")), el("pre", { tabindex: 0 }, group.nodeTexts(v).join("") || "(nothing in common)"));
    this.filter();
  }

  // Hides what does not pass the filters; `searched` when the wanted text changed.
  filter(searched = false) {
    const value = (name) => { const { value: text } = this.form.elements[name]; return text === "" ? null : Number(text); };
    const within = (x, name) => (value(`${name}-low`) === null || x >= value(`${name}-low`)) && (value(`${name}-high`) === null || x <= value(`${name}-high`));
    const paid = value("paid-low");
    if (searched) this.wanted = this.search.value.toLowerCase();
    let count = 0;
    for (const text of this.texts) {
      const { row } = text;
      if (searched) { text.search(this.wanted); text.redraw(); }
      const passes = (this.node === null || row.path.includes(this.node)) && within(row.reward, "reward") && within(row.length, "length") &&
        (paid === null || this.shownMethods.some((m) => this.group.methods[m].largest[row.number] >= paid)) && (!this.wanted || text.hits.size > 0);
      text.article.hidden = !passes;
      count += passes;
    }
    this.count.textContent = `${count} of ${this.texts.length}`;
  }

  sort(by) {
    const rank = { tree: (t) => this.tree.lanes.indexOf(t.row), number: (t) => t.row.number, reward: (t) => -t.row.reward, length: (t) => t.row.length }[by];
    this.texts.sort((a, b) => rank(a) - rank(b));
    this.list.append(...this.texts.map((text) => text.article));
  }

  get visible() {
    return this.texts.filter((text) => !text.article.hidden);
  }

  go(number) {
    const text = this.texts.find((t) => t.row.number === number);
    if (text.article.hidden) this.reset();
    text.article.scrollIntoView({ block: "start" });
    text.article.focus({ preventScroll: true });
  }

  next(direction) {
    const among = this.visible, at = among.indexOf(this.current), text = among[at < 0 ? 0 : Math.max(0, Math.min(among.length - 1, at + direction))];
    if (text) this.go(text.row.number);
  }

  move(text, position) {
    if (this.current && this.current !== text && this.current.cursor !== null) { this.current.cursor = null; this.current.redraw(); }
    this.current = text;
    text.article.focus({ preventScroll: true });
    return text.reveal(position, this.shownMethods[0]);
  }

  token(direction, wanted = () => true) {
    const text = this.current && !this.current.article.hidden ? this.current : this.visible[0];
    if (!text) return;
    const to = text.step(text.cursor ?? (direction > 0 ? -1 : text.texts.length), direction, wanted);
    if (to !== null) this.move(text, to);
  }

  branch(direction) {
    this.token(direction, (i) => (this.current ?? this.visible[0]).isBranch(i));
  }

  nextHit() {
    const among = this.visible, start = Math.max(0, among.indexOf(this.current));
    for (let i = 0; i <= among.length; i++) {
      const text = among[(start + i) % among.length];
      const to = text?.step(i ? -1 : text.cursor ?? -1, 1, (t) => text.hits.has(t) && !text.hits.has(t - 1));
      if (to !== null && to !== undefined) return this.move(text, to).then(() => this.search.focus({ preventScroll: true }));
    }
  }

  reset() {
    this.form.reset();
    if (this.node !== null) this.choose(this.node);
    for (const text of this.texts) if (text.cursor !== null) { text.cursor = null; text.redraw(); }
    hideCard();
    this.filter(true);
  }
}
