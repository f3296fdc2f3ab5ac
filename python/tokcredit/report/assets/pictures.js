// The charts of a run. The numbers come with the page and are only drawn here.

function runCharts(summary) {
  const { methods, edges } = summary;
  return [
    branches(summary.branches), lengths(summary.lengths, edges),
    ...METHODS.map((m) => advantages(m, methods[m].advantages)),
    ...METHODS.filter((m) => methods[m].ratios).map((m) => ratios(m, methods[m].ratios, edges)),
    ...METHODS.map((m) => signs(m, methods[m].signs)), rewards(summary),
  ];
}

const between = (edges, i) => `tokens ${whole(edges[i] + 1)} to ${whole(edges[i + 1])}`;
const DECADES = [0, 1, 3, 10, 30, 100, 300, 1000, 3000, 1e4, 3e4, 1e5];

function branches({ fraction: share, edges }) {
  const top = largest(share) || 1, end = edges.at(-1);
  const chart = new Chart([0, Math.log1p(end)], [0, top], "Fraction of branch tokens by position"), linear = chart.x;
  chart.x = (position) => linear(Math.log1p(position));
  chart.axes(DECADES.filter((v) => v <= end), ticks(0, top).filter((v) => v <= top),
    "position in the rollout, logarithmic", brief, (v) => percent(v, top < 0.05 ? 1 : 0));
  share.forEach((y, i) => y && chart.bar(edges[i], edges[i + 1], 0, y));
  const tips = chart.tips(edges, (i) => share[i] !== null && [between(edges, i), `${percent(share[i], 2)} branch`]);
  return figure("Where responses branch",
    "Fraction of tokens, by position, at which a response differs from others that began alike.", tips);
}

function lengths({ above, below, mean_above: meanAbove, mean_below: meanBelow }, edges) {
  const top = Math.max(largest(above), largest(below)) || 1, end = edges.at(-1);
  const chart = new Chart([0, end], [-top, top], "Lengths of rollouts above and below their prompt's mean reward");
  chart.axes(ticks(0, end).filter((v) => v <= end), ticks(-top, top).filter((v) => Math.abs(v) <= top),
    "tokens of the rollout", brief, (v) => brief(Math.abs(v)));
  above.forEach((n, i) => n && chart.bar(edges[i], edges[i + 1], 0, n, "pos"));
  below.forEach((n, i) => n && chart.bar(edges[i], edges[i + 1], 0, -n, "neg"));
  const means = [meanAbove, meanBelow].map((mean) => whole(Math.round(mean)));
  const told = `Rollouts above their prompt's mean reward have ${means[0]} tokens on average, those below ${means[1]}.`;
  return figure("Length and reward", meanAbove || meanBelow ? told : "No prompt's rewards differ.",
    chart.tips(edges, (i) => [between(edges, i), `${above[i]} above the mean`, `${below[i]} below`]));
}

function advantages(method, { edges, counts }) {
  const top = Math.sqrt(largest(counts)) || 1, end = edges.at(-1);
  const chart = new Chart([-end, end], [0, top], `Distribution of the advantages of ${method}`), linear = chart.y;
  chart.y = (n) => linear(Math.sqrt(n));
  chart.axes(ticks(-end, end, 6).filter((v) => Math.abs(v) <= end),
    [0, 0.25, 0.5, 0.75, 1].map((part) => +((part * top) ** 2).toPrecision(1)), "advantage");
  const kind = (i) => (edges[i] > 0 ? "pos" : edges[i + 1] < 0 ? "neg" : "");
  counts.forEach((n, i) => n && chart.bar(edges[i], edges[i + 1], 0, n, kind(i)));
  const span = (i) => `${shown(edges[i], 3)} to ${shown(edges[i + 1], 3)}`;
  return figure(`Advantages, ${method}`,
    "Number of tokens by advantage, on a square-root scale, which shows rare advantages.",
    chart.tips(edges, (i) => [span(i), `${whole(counts[i])} tokens`]));
}

function ratios(method, { quantiles, low, high, clipped }, edges) {
  const log = (x) => (x === null ? null : Math.log(Math.max(x, 1e-9))), end = edges.at(-1);
  const spread = quantiles.filter(Boolean).flatMap((q) => [log(q[0]), log(q[4])]).map(Math.abs);
  const window = [...low, ...high].filter((x) => x !== null).map(log).map(Math.abs);
  const bound = Math.max(...spread, Math.min(1, largest(window))) * 1.08 || 0.1;
  const chart = new Chart([0, end], [-bound, bound], `Ratios of ${method} by position, with the bounds of the clip`);
  chart.axes(ticks(0, end).filter((v) => v <= end), ratioTicks(bound), "position in the rollout", brief,
    (v) => `${+Math.exp(v).toPrecision(5)}`);
  const points = (get) => quantiles.map((q, i) => [(edges[i] + edges[i + 1]) / 2, ...get(q, i)]);
  chart.band(points((q) => (q ? [log(q[0]), log(q[4])] : [null])));
  chart.band(points((q) => (q ? [log(q[1]), log(q[3])] : [null])), "inner");
  chart.line(points((q) => [q ? log(q[2]) : null]));
  for (const side of [low, high]) chart.line(points((_, i) => [log(side[i])]), "window");
  const limits = (i) => low[i] === null && high[i] === null ? "no bounds"
    : `bounds ${low[i] === null ? 0 : shown(low[i], 4)} … ${high[i] === null ? "∞" : shown(high[i], 4)}`;
  const tell = (q, i) => [between(edges, i), `median ${shown(q[2], 4)}`,
    `90% within ${shown(q[0], 3)} … ${shown(q[4], 3)}`, limits(i), `${percent(clipped[i])} clipped`];
  return figure(`Ratios, ${method}`, "Ratio of the new to the old probability by position, with the bounds of the clip.",
    chart.tips(edges, (i) => quantiles[i] && tell(quantiles[i], i)),
    key(["half", "50% of the tokens"], ["most", "90% of the tokens"], ["window", "bounds of the clip"]));
}

// Round ratios whose logarithms lie within the bound.
function ratioTicks(bound) {
  const far = [1e-4, 1e-3, 0.01, 0.1, 1, 10, 100, 1e3, 1e4], near = [0.2, 0.5, 1, 2, 5];
  const round = bound > 2.4 ? far : bound > 0.7 ? near : ticks(Math.exp(-bound), Math.exp(bound), 4);
  return round.map(Math.log).filter((v) => Math.abs(v) <= bound);
}

function signs(method, shares) {
  const left = 112, width = 350, label = `Positive and negative rollouts, ${method}`;
  const svg = draw("svg", { viewBox: "0 0 470 140", role: "img", "aria-label": label });
  const rows = { rollouts: shares.rollouts, tokens: shares.tokens, "weighted |A|": shares.weighted };
  Object.entries(rows).forEach(([name, [pos, neg]], i) => {
    const y = 12 + i * 44;
    svg.append(draw("text", { x: left - 10, y: y + 16, "text-anchor": "end" }, name));
    for (const [share, x, kind] of [[pos, left, "pos"], [neg, left + pos * width + 1, "neg"]])
      svg.append(draw("rect", { class: `bar ${kind}`, x, y, width: Math.max(0, share * width - 1), height: 24 }));
    for (const [share, x, anchor] of [[pos, left + 8, "start"], [neg, left + width - 8, "end"]])
      if (share > 0.09)
        svg.append(draw("text", { class: "on-bar", x, y: y + 16.5, "text-anchor": anchor }, percent(share, 0)));
  });
  return figure(`Positive and negative rollouts, ${method}`,
    "Fractions of the rollouts, of their tokens, and of the sum of |advantage| × weight, which is what the loss sees.",
    svg, key(["pos", "positive median advantage"], ["neg", "negative median advantage"]));
}

function rewards({ means: { edges, counts }, equal_rewards: equal, groups }) {
  const low = edges[0], high = edges.at(-1), top = largest(counts);
  const chart = new Chart([low, high], [0, top], "Mean rewards of the prompts");
  chart.axes(ticks(low, high, 5), ticks(0, top, 3).filter((v) => v <= top && Number.isInteger(v)),
    "mean reward of a prompt");
  counts.forEach((n, i) => n && chart.bar(edges[i], edges[i + 1], 0, n));
  const told = `${equal} of ${groups} prompts ${equal === 1 ? "has" : "have"} equal rewards.`;
  const span = (i) => `${shown(edges[i], 2)} to ${shown(edges[i + 1], 2)}`;
  return figure("Prompts by mean reward", `${told} A group baseline gives them advantages of 0.`,
    chart.tips(edges, (i) => [span(i), `${counts[i]} ${counts[i] === 1 ? "prompt" : "prompts"}`]));
}
