// Which view is shown, the list of prompts, the theme and the keys.

const main = document.getElementById("main");
let view = null;

function promptList() {
  document.getElementById("prompts").append(...HEADER.prompts.map((prompt, i) => {
    const { mean } = prompt, range = span(prompt.rewards, mean);
    const dots = prompt.rewards.toSorted((a, b) => b - a).slice(0, 24).map((r) => el("i", { style: `background:${mixed(r, range)}` }));
    return el("li", {}, el("a", { href: `#${prompt.group}`, "data-group": prompt.group, "aria-label": `Prompt ${i + 1}, mean reward ${plain(mean)}: ${prompt.prompt}` }, el("p", {}, prompt.prompt || `Prompt ${i + 1}`),
      el("div", { class: "rewards" }, ...dots, el("span", {}, prompt.signal ? shown(mean, 2) : "no signal"))));
  }));
  const find = document.getElementById("find");
  find.addEventListener("input", () => {
    for (const link of document.querySelectorAll("#prompts a")) link.parentElement.hidden = !link.textContent.toLowerCase().includes(find.value.toLowerCase());
  });
  document.getElementById("where").textContent = [HEADER.name, HEADER.step !== null && `step ${HEADER.step}`, METHODS.join(", ")].filter(Boolean).join(" · ");
}

async function route() {
  const wanted = /^#(\d+)(?:-(\d+))?$/.exec(location.hash);
  const entry = wanted && HEADER.prompts.find((p) => p.group === Number(wanted[1]));
  hideCard();
  seen.disconnect();
  for (const link of document.querySelectorAll("nav a")) link.removeAttribute("aria-current");
  const link = document.querySelector(entry ? `#prompts a[data-group="${entry.group}"]` : "#link-run");
  link.setAttribute("aria-current", "page");
  link.scrollIntoView({ block: "nearest" });
  const here = location.hash;
  if (!entry) {
    view = null;
    main.replaceChildren(runPage());
  } else {
    const group = await open(entry.group);
    if (location.hash !== here) return;
    view = new GroupPage(group);
    main.replaceChildren(view.render());
  }
  scrollTo(0, 0);
  if (entry && wanted[2] !== undefined) view.go(Number(wanted[2]));
  document.body.dataset.ready = entry ? entry.group : "run";
}

function neighbour(direction) {
  const links = [...document.querySelectorAll("#prompts li:not([hidden]) a")];
  const at = links.findIndex((link) => link.hasAttribute("aria-current"));
  const to = links[at < 0 ? (direction > 0 ? 0 : links.length - 1) : at + direction];
  if (to) location.hash = to.getAttribute("href");
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  if (view) view.texts.forEach((text) => text.strip(view.shownMethods[0]));
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const flip = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
const help = document.getElementById("help");

const KEYS = {
  "[": () => neighbour(-1), "]": () => neighbour(1), o: () => (location.hash = "#run"), t: flip, "?": () => help.showModal(),
  j: () => view?.next(1), k: () => view?.next(-1), ArrowRight: () => view?.token(1), ArrowLeft: () => view?.token(-1),
  b: () => view?.branch(1), B: () => view?.branch(-1), Escape: () => view?.reset(), "/": () => view ? view.search.focus() : document.getElementById("find").focus(),
  x: () => view?.current?.fold(!view.current.article.classList.contains("folded")),
  m: () => view && METHODS.length > 1 && view.use([...METHODS, "all"][([...METHODS, "all"].indexOf(view.method) + 1) % (METHODS.length + 1)]),
};

addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select, textarea, dialog");
  if (event.ctrlKey || event.metaKey || event.altKey || (typing && event.key !== "Escape") || help.open) return;
  const act = KEYS[event.key];
  if (!act) return;
  if (typing) event.target.blur();
  event.preventDefault();
  act();
});
let resizing = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(() => view?.texts.forEach((text) => text.strip(view.shownMethods[0])));
});
addEventListener("scroll", placeCard, { passive: true });
addEventListener("hashchange", route);
dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", flip);
document.getElementById("help-button").addEventListener("click", KEYS["?"]);
theme(dark.matches ? "dark" : "light");
promptList();
route().catch((error) => {
  main.replaceChildren(el("p", { class: "note" }, `This page needs a browser with DecompressionStream (2023 or newer). ${error.message}`));
  throw error;
});
