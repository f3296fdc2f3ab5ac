// The run as a whole: figures of every method, and six pictures.

function runPage() {
  const { summary, settings, notes, step } = HEADER;
  const facts = [
    ["prompts", whole(summary.groups)], ["rollouts", whole(summary.rollouts)], ["tokens", whole(summary.tokens)],
    ["mean reward", shown(summary.reward, 3)],
    ["prompts without signal", `${summary.silent} of ${summary.groups}`],
    ["tokens where rollouts part", percent(summary.branch_share)],
  ];
  const from = [settings.model && `model ${settings.model}`, settings.method && `trained with ${settings.method}`, settings.version && `tokcredit ${settings.version}`];
  return el("div", {},
    el("h1", {}, step === null ? "The run" : `Step ${step}`),
    el("p", { class: "muted" }, from.filter(Boolean).join(" · ")),
    ...notes.map((note) => el("p", { class: "note", role: "note" }, note)),
    el("dl", { class: "facts" }, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    el("h2", {}, "What each method pays"),
    el("p", {}, "A token carries credit beyond the constant when its advantage is not the median of its rollout. The effective share is (Σ q)² / (n Σ q²) of the ratios: 1 when all are equal."),
    methodTable(summary.methods),
    el("div", { class: "charts" }, branches(summary), lengths(summary), ...METHODS.map((m) => advantages(m, summary.methods[m])),
      ...METHODS.filter((m) => summary.methods[m].ratios).map((m) => ratios(m, summary.methods[m].ratios, summary.edges)),
      ...METHODS.map((m) => signs(m, summary.methods[m].signs)), rewards(summary)));
}

function methodTable(figures) {
  const columns = [
    ["tokens beyond the constant", (f) => percent(f.beyond)], ["credit beyond the constant", (f) => percent(f.beyond_credit)],
    ["rollouts that move the policy", (f) => percent(f.moves, 0)], ["tokens the clip stops", (f) => percent(f.clipped)],
    ["effective share", (f) => (f.effective === null ? "–" : shown(f.effective, 3))],
  ];
  const rows = METHODS.flatMap((m) => [
    el("tr", {}, el("td", {}, m), ...columns.map(([, get]) => el("td", {}, get(figures[m])))),
    el("tr", { class: "how" }, el("td", { colspan: columns.length + 1 }, HEADER.methods[m])),
  ]);
  return el("div", { class: "scroll" }, el("table", { class: "methods" },
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "method"), ...columns.map(([name]) => el("th", { scope: "col" }, name)))), el("tbody", {}, ...rows)));
}

const middle = (edges, i) => (edges[i] + edges[i + 1]) / 2;
const between = (edges, i) => `tokens ${whole(edges[i] + 1)} to ${whole(edges[i + 1])}`;

function branches({ branches: { share, edges } }) {
  const top = largest(share) || 1, end = edges.at(-1), log = Math.log1p;
  const chart = new Chart([0, log(end)], [0, top], "Share of branch tokens by position");
  chart.x = ((scale) => (v) => scale(log(v)))(chart.x);
  const decades = [0, 1, 3, 10, 30, 100, 300, 1000, 3000, 1e4, 3e4, 1e5].filter((v) => v <= end);
  chart.axes(decades, ticks(0, top).filter((v) => v <= top), "position in the rollout, logarithmic", brief, (v) => percent(v, top < 0.05 ? 1 : 0));
  share.forEach((y, i) => y && chart.bar(edges[i], edges[i + 1], 0, y));
  return figure("Where rollouts part", "Share of tokens, by position, at which a rollout leaves the others of its prompt.",
    chart.tips(edges, (i) => share[i] !== null && [between(edges, i), `${percent(share[i], 2)} branch`]).svg);
}

function advantages(method, { advantages: { edges, counts } }) {
  // Roots of counts: a few tokens with much credit are what one looks for.
  const top = Math.sqrt(largest(counts)) || 1, end = edges.at(-1), y = [0, 0.25, 0.5, 0.75, 1].map((part) => +((part * top) ** 2).toPrecision(1));
  const chart = new Chart([-end, end], [0, top], `Distribution of the advantages of ${method}`);
  chart.y = ((scale) => (v) => scale(Math.sqrt(v)))(chart.y);
  chart.axes(ticks(-end, end, 6), y, "advantage");
  counts.forEach((n, i) => n && chart.bar(edges[i], edges[i + 1], 0, n, middle(edges, i) > 1e-9 ? "pos" : middle(edges, i) < -1e-9 ? "neg" : ""));
  return figure(`Advantages, ${method}`, "Tokens by what they are paid. Heights are roots of counts, so that rare credit is seen.",
    chart.tips(edges, (i) => [`${shown(edges[i], 3)} to ${shown(edges[i + 1], 3)}`, `${whole(counts[i])} tokens`]).svg);
}

function ratios(method, { quantiles, low, high, clipped }, edges) {
  const log = (x) => (x === null ? null : Math.log(Math.max(x, 1e-9)));
  const spread = quantiles.filter(Boolean).flatMap((q) => [log(q[0]), log(q[4])]);
  const window = [...low, ...high].filter((x) => x !== null).map(log);
  const bound = Math.max(...spread.map(Math.abs), Math.min(1, Math.max(0, ...window.map(Math.abs)))) * 1.08 || 0.1;
  const end = edges.at(-1);
  const chart = new Chart([0, end], [-bound, bound], `Ratios of ${method} by position, with the clip window`);
  chart.axes(ticks(0, end), ratioTicks(bound), "position in the rollout", brief, (v) => `${+Math.exp(v).toPrecision(5)}`);
  const points = (get) => quantiles.map((q, i) => [middle(edges, i), ...get(q, i)]);
  chart.band(points((q) => (q ? [log(q[0]), log(q[4])] : [null])));
  chart.band(points((q) => (q ? [log(q[1]), log(q[3])] : [null])), "inner");
  chart.line(points((q) => [q ? log(q[2]) : null]));
  chart.line(points((q, i) => [log(low[i])]), "window");
  chart.line(points((q, i) => [log(high[i])]), "window");
  const key = el("p", { class: "key" }, el("span", {}, el("i", { style: "background:rgb(var(--pos)/.47)" }), "half of the tokens"), el("span", {}, el("i", { style: "background:rgb(var(--pos)/.17)" }), "nine in ten"), el("span", {}, el("i", { style: "background:none;height:0;border-top:1.5px dashed rgb(var(--neg));vertical-align:3px" }), "clip window"));
  return figure(`Ratios, ${method}`, "New over old probability, by position, against the window of the clip.",
    chart.tips(edges, (i) => quantiles[i] && [between(edges, i), `median ${shown(quantiles[i][2], 4)}`, `90% within ${shown(quantiles[i][0], 3)} … ${shown(quantiles[i][4], 3)}`,
      low[i] === null && high[i] === null ? "no window" : `window ${low[i] === null ? 0 : shown(low[i], 4)} … ${high[i] === null ? "∞" : shown(high[i], 4)}`, `${percent(clipped[i])} stopped`]).svg, key);
}

// Round ratios whose logarithms lie within the bound.
function ratioTicks(bound) {
  const far = [1e-4, 1e-3, 0.01, 0.1, 1, 10, 100, 1e3, 1e4], near = [0.2, 0.5, 1, 2, 5];
  const round = bound > 2.4 ? far : bound > 0.7 ? near : ticks(Math.exp(-bound), Math.exp(bound), 4);
  return round.map(Math.log).filter((v) => Math.abs(v) <= bound);
}

function lengths({ lengths: { above, below, mean_above, mean_below }, edges }) {
  const top = Math.max(largest(above), largest(below)) || 1, end = edges.at(-1);
  const chart = new Chart([0, end], [-top, top], "Lengths of rollouts above and below their prompt's mean reward");
  chart.axes(ticks(0, end), ticks(-top, top, 4), "tokens of the rollout", brief, (v) => brief(Math.abs(v)));
  above.forEach((n, i) => n && chart.bar(edges[i], edges[i + 1], 0, n, "pos"));
  below.forEach((n, i) => n && chart.bar(edges[i], edges[i + 1], 0, -n, "neg"));
  return figure("Length against sign", `Rollouts above their prompt's mean reward have ${whole(Math.round(mean_above))} tokens on average, those below ${whole(Math.round(mean_below))}.`,
    chart.tips(edges, (i) => [between(edges, i), `${above[i]} above the mean`, `${below[i]} below`]).svg);
}

function signs(method, shares) {
  const rows = [["rollouts", shares.rollouts], ["tokens", shares.tokens], ["credit in the loss", shares.credit]];
  const svg = draw("svg", { viewBox: "0 0 470 140", role: "img", "aria-label": `Shares of paid and charged rollouts, ${method}` });
  rows.forEach(([name, [pos, neg]], i) => {
    const y = 12 + i * 44, width = 350, left = 112;
    svg.append(draw("text", { x: left - 10, y: y + 16, "text-anchor": "end" }, name));
    svg.append(draw("rect", { class: "bar pos", x: left, y, width: Math.max(0, pos * width - 1), height: 24, rx: 2 }));
    svg.append(draw("rect", { class: "bar neg", x: left + pos * width + 1, y, width: Math.max(0, neg * width - 1), height: 24, rx: 2 }));
    for (const [share, x, anchor] of [[pos, left + 8, "start"], [neg, left + width - 8, "end"]])
      if (share > 0.09) svg.append(draw("text", { x, y: y + 16.5, "text-anchor": anchor, style: "fill:#fff;font-weight:600" }, percent(share, 0)));
  });
  const key = el("p", { class: "key" }, el("span", {}, el("i", { style: "background:rgb(var(--pos)/.85)" }), "paid more than nothing"), el("span", {}, el("i", { style: "background:rgb(var(--neg)/.85)" }), "paid less"));
  return figure(`Who weighs how much, ${method}`, "Long rollouts of one sign outweigh the other where all tokens count alike; the last bar is what reaches the loss.", svg, key);
}

function rewards({ means: { edges, counts }, silent, groups }) {
  const low = edges[0], high = edges.at(-1), top = largest(counts);
  const chart = new Chart([low, high], [0, top], "Mean rewards of the prompts");
  chart.axes(ticks(low, high, 5), ticks(0, top, 3).filter(Number.isInteger), "mean reward of a prompt");
  counts.forEach((n, i) => n && chart.bar(edges[i], edges[i + 1], 0, n));
  const silence = silent === 1 ? "1 prompt has" : `${silent} of ${groups} prompts have`;
  return figure("Prompts by mean reward", `${silence} equal rewards everywhere and pay nothing relative to the group.`,
    chart.tips(edges, (i) => [`${shown(edges[i], 2)} to ${shown(edges[i + 1], 2)}`, `${counts[i]} prompts`]).svg);
}
