// The run as a whole: its facts, and the figures of every method.

function runPage() {
  const { summary, settings, notes, step } = HEADER;
  const facts = {
    prompts: whole(summary.groups),
    rollouts: whole(summary.rollouts),
    tokens: whole(summary.tokens),
    "distinct tokens": `${whole(summary.distinct)} (${percent(summary.tokens ? summary.distinct / summary.tokens : 0, 0)})`,
    "mean reward": shown(summary.reward, 3),
    "prompts with equal rewards": `${summary.equal_rewards} of ${summary.groups}`,
    "branch tokens": percent(summary.branch_fraction),
  };
  const origin = [["model ", settings.model], ["trained with ", settings.method], ["tokcredit ", settings.version]];
  return el("div", {},
    el("h1", {}, step === null ? "The run" : `Step ${step}`),
    el("p", { class: "muted" }, origin.filter(([, what]) => what).map((words) => words.join("")).join(" · ")),
    ...notes.map((note) => el("p", { class: "note", role: "note" }, note)),
    el("dl", { class: "facts" }, ...Object.entries(facts).map(([name, value]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    el("h2", {}, "Methods"),
    el("p", {}, "A token is token-level if its advantage differs from the median of its rollout. " +
      "The effective sample size of n ratios q is (Σ q)² / Σ q²; the table shows its fraction of n, which is 1 when all " +
      "ratios are equal."),
    methodTable(summary.methods),
    el("div", { class: "charts" }, ...runCharts(summary)));
}

function methodTable(figures) {
  const columns = {
    "token-level tokens": (f) => percent(f.token_level),
    "token-level share of |advantage|": (f) => percent(f.token_level_advantage),
    "rollouts with a gradient": (f) => percent(f.has_gradient, 0),
    "clipped tokens": (f, m) => (hasRatio(m) ? percent(f.clipped) : "not applicable"),
    "effective sample size": (f, m) =>
      !hasRatio(m) ? "not applicable" : f.effective === null ? "–" : shown(f.effective, 3),
  };
  if (METHODS.some(hasMargin)) {
    const ofPairs = (text) => (f, m) => (!hasMargin(m) ? "not applicable" : f.margin === null ? "–" : text(f));
    columns["mean margin"] = ofPairs((f) => plain(f.margin));
    columns["margins above 0"] = ofPairs((f) => percent(f.accuracy));
  }
  const names = Object.keys(columns), gets = Object.values(columns);
  const rows = METHODS.flatMap((m) => [
    el("tr", {}, el("td", {}, m), ...gets.map((get) => el("td", {}, get(figures[m], m)))),
    el("tr", { class: "how" }, el("td", { colspan: names.length + 1 }, HEADER.methods[m])),
  ]);
  const head = ["method", ...names].map((name) => el("th", { scope: "col" }, name));
  return el("div", { class: "scroll" },
    el("table", { class: "methods" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)));
}
