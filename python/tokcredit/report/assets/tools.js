// The bar above the rollouts: which method, which rollouts, in which order.

const COLOURS = { advantage: "colour: weight", log_ratio: "colour: log-ratio" };
const ORDERS = { tree: "tree order", number: "as sampled", reward: "by reward", length: "by length" };

function toolBar(page) {
  const number = (name, label) =>
    el("input", { type: "number", step: "any", name, "aria-label": label, oninput: () => page.filter() });
  const range = (name, title) =>
    el("label", {}, title, number(`${name}-low`, `${title}, at least`), "–",
      number(`${name}-high`, `${title}, at most`));
  const search = el("input", {
    type: "search", name: "search", placeholder: "Search the rollouts", "aria-label": "Search the rollouts",
    oninput: () => page.filter(true),
    onkeydown: (event) => event.key === "Enter" && page.nextHit(),
  });
  const order = el("select", { name: "order", "aria-label": "Order", hidden: page.pair !== null,
    onchange: () => page.sort(order.value) },
    ...Object.entries(ORDERS).map(([value, text]) => el("option", { value }, text)));
  const choices = METHODS.length > 1 ? [...METHODS, "all"] : METHODS;
  const methods = choices.map((m) =>
    el("button", { type: "button", "data-method": m, onclick: () => page.use(m) }, m === "all" ? "side by side" : m));
  const colour = METHODS.some(hasMargin)
    ? el("select", { name: "colour", "aria-label": "Colour", onchange: () => page.colourBy(colour.value) },
      ...Object.entries(COLOURS).map(([value, text]) => el("option", { value }, text)))
    : null;
  return el("form", { class: "tools row", onsubmit: (event) => event.preventDefault() },
    el("div", { class: "switch", role: "group", "aria-label": "Method" }, ...methods),
    search, range("reward", "reward"), range("length", "tokens"),
    el("label", {}, "|A| at least", number("advantage-low", "largest absolute advantage, at least")), order, colour);
}

// The test that a rollout must pass by the bar's numbers.
function passing(form, group, methods) {
  const bound = (name, none) => (form.elements[name].value === "" ? none : Number(form.elements[name].value));
  const [shortest, longest] = [bound("length-low", -Infinity), bound("length-high", Infinity)];
  const [worst, best] = [bound("reward-low", -Infinity), bound("reward-high", Infinity)];
  const least = bound("advantage-low", -Infinity);
  return (row) => row.length >= shortest && row.length <= longest && row.reward >= worst && row.reward <= best &&
    methods.some((m) => group.methods[m].largest[row.number] >= least);
}

function legend(page, method) {
  const bound = page.scale(method), figures = HEADER.summary.methods[method];
  const what = page.colourOf(method) === "log_ratio" ? "log-ratio" : hasMargin(method) ? "weight" : "advantage";
  const mark = (kind, text, meaning) => el("p", { class: "text" }, el("span", { class: kind }, text), ` ${meaning}`);
  return [
    el("p", { class: "scale" }, shown(-bound, 2), el("i", { class: "advantages" }), shown(bound, 2),
      el("span", {}, `${what} of the token`)),
    mark("branch", "branch", "token at which responses branch"),
    hasRatio(method) ? mark("clipped", "dotted", "outside the clip's bounds") : null,
    mark("outside", "grey", "does not train"),
    figures.barrier ? mark("barrier", "barrier", "counts in the barrier") : null,
  ].filter((part) => part !== null);
}
