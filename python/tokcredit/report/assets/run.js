// The run as a whole: its facts, and the figures of every method.

function runPage() {
  const { summary, settings, notes, step } = HEADER;
  const facts = {
    prompts: whole(summary.groups),
    rollouts: whole(summary.rollouts),
    tokens: whole(summary.tokens),
    "mean reward": shown(summary.reward, 3),
    "prompts without signal": `${summary.silent} of ${summary.groups}`,
    "tokens where rollouts part": percent(summary.branch_share),
  };
  const origin = [["model ", settings.model], ["trained with ", settings.method], ["tokcredit ", settings.version]];
  return el("div", {},
    el("h1", {}, step === null ? "The run" : `Step ${step}`),
    el("p", { class: "muted" }, origin.filter(([, what]) => what).map((words) => words.join("")).join(" · ")),
    ...notes.map((note) => el("p", { class: "note", role: "note" }, note)),
    el("dl", { class: "facts" }, ...Object.entries(facts).map(([name, value]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    el("h2", {}, "What each method pays"),
    el("p", {}, "A token carries credit beyond the constant when its advantage is not the median of its rollout. " +
      "The effective share is (Σ q)² / (n Σ q²) of the ratios: 1 when all are equal."),
    methodTable(summary.methods),
    el("div", { class: "charts" }, ...runCharts(summary)));
}

function methodTable(figures) {
  const columns = {
    "tokens beyond the constant": (f) => percent(f.beyond),
    "credit beyond the constant": (f) => percent(f.beyond_credit),
    "rollouts that move the policy": (f) => percent(f.moves, 0),
    "tokens the clip stops": (f) => percent(f.clipped),
    "effective share": (f) => (f.effective === null ? "–" : shown(f.effective, 3)),
  };
  const names = Object.keys(columns), gets = Object.values(columns);
  const rows = METHODS.flatMap((m) => [
    el("tr", {}, el("td", {}, m), ...gets.map((get) => el("td", {}, get(figures[m])))),
    el("tr", { class: "how" }, el("td", { colspan: names.length + 1 }, HEADER.methods[m])),
  ]);
  const head = ["method", ...names].map((name) => el("th", { scope: "col" }, name));
  return el("div", { class: "scroll" },
    el("table", { class: "methods" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)));
}
