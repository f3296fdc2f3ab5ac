// The list of prompts, which view is shown, the theme and the keys.

const main = document.getElementById("main"), help = document.getElementById("help");
const find = document.getElementById("find");
let view = null;

function promptList() {
  document.getElementById("prompts").append(...HEADER.prompts.map(({ group, prompt, rewards, mean, differ }, i) => {
    const range = span(rewards, mean), best = rewards.toSorted((a, b) => b - a).slice(0, 24);
    const dots = best.map((reward) => el("i", { style: `background:${mixed(reward, range)}` }));
    const label = `Prompt ${i + 1}, mean reward ${plain(mean)}: ${prompt}`;
    return el("li", {}, el("a", { href: `#${group}`, "data-group": group, "aria-label": label },
      el("p", {}, prompt || `Prompt ${i + 1}`),
      el("div", { class: "rewards" }, ...dots, el("span", {}, differ ? shown(mean, 2) : `all ${shown(mean, 2)}`))));
  }));
  find.addEventListener("input", () => {
    for (const link of document.querySelectorAll("#prompts a"))
      link.parentElement.hidden = !link.textContent.toLowerCase().includes(find.value.toLowerCase());
  });
  const step = HEADER.step === null ? null : `step ${HEADER.step}`;
  document.getElementById("where").textContent = [HEADER.name, step, METHODS.join(", ")].filter(Boolean).join(" · ");
}

// `#run` is the run, `#3` prompt 3, `#3-5` its rollout 5.
async function route() {
  const here = location.hash, wanted = /^#(\d+)(?:-(\d+))?$/.exec(here);
  const entry = wanted && HEADER.prompts.find((p) => p.group === Number(wanted[1]));
  hideCard();
  seen.disconnect();
  for (const link of document.querySelectorAll("nav a")) link.removeAttribute("aria-current");
  const link = document.querySelector(entry ? `#prompts a[data-group="${entry.group}"]` : "#link-run");
  link.setAttribute("aria-current", "page");
  link.scrollIntoView({ block: "nearest" });
  view = entry ? new GroupPage(await open(entry.group)) : null;
  if (location.hash !== here) return;
  main.replaceChildren(view ? view.render() : runPage());
  scrollTo(0, 0);
  if (view && wanted[2] !== undefined) view.go(Number(wanted[2]));
  document.body.dataset.ready = entry ? entry.group : "run";
}

function neighbour(direction) {
  const links = [...document.querySelectorAll("#prompts li:not([hidden]) a")];
  const at = links.findIndex((link) => link.hasAttribute("aria-current"));
  const to = links[at < 0 ? (direction > 0 ? 0 : links.length - 1) : at + direction];
  if (to) location.hash = to.getAttribute("href");
}

function nextMethod() {
  const choices = METHODS.length > 1 ? [...METHODS, "all"] : METHODS;
  view?.use(choices[(choices.indexOf(view.method) + 1) % choices.length]);
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  view?.strips();
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const flip = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

const KEYS = {
  "[": () => neighbour(-1), "]": () => neighbour(1), o: () => (location.hash = "#run"),
  j: () => view?.next(1), k: () => view?.next(-1),
  ArrowRight: () => view?.token(1), ArrowLeft: () => view?.token(-1),
  b: () => view?.branch(1), B: () => view?.branch(-1), n: () => view?.turn(1), N: () => view?.turn(-1),
  x: () => view?.current?.button.click(), m: nextMethod, "/": () => (view ? view.form.elements.search : find).focus(),
  t: flip, "?": () => help.showModal(), Escape: () => view?.reset(),
};

addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || help.open || (typing && event.key !== "Escape")) return;
  if (!KEYS[event.key]) return;
  typing?.blur();
  event.preventDefault();
  KEYS[event.key]();
});
let resizing = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(() => view?.strips());
});
addEventListener("scroll", placeCard, { passive: true });
addEventListener("hashchange", route);
dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", flip);
document.getElementById("help-button").addEventListener("click", KEYS["?"]);
theme(dark.matches ? "dark" : "light");
promptList();
route().catch((error) => {
  const advice = "This page needs a browser with DecompressionStream (2023 or newer).";
  main.replaceChildren(el("p", { class: "note" }, `${advice} ${error.message}`));
  throw error;
});
