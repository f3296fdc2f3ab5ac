// Prompts with the scores of their tokens: the importance for the whole response, or the scores for one token of it.

const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => (document.documentElement.dataset.theme = dark.matches ? "dark" : "light");

function scoreText(x) {
  return String(x).replace("-", "−");
}

function scored({ about, prompt_texts: prompt, response_texts: response, scores, importance }) {
  const written = (text) => text.replace(/\n/g, "↵\n");
  const choices = [["importance", importance], ...response.map((text, t) => [text, scores[t]])];
  const text = el("div", { class: "text" });
  const buttons = choices.map(([name, row]) => el("button", { type: "button", onclick: () => show(row) }, written(name)));
  function show(row) {
    const scale = Math.max(...row.map(Math.abs)) || 1, total = row.reduce((sum, x) => sum + Math.abs(x), 0) || 1;
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(choices[i][1] === row)));
    text.replaceChildren(...prompt.map((token, i) => {
      const told = `score ${scoreText(row[i])}, ${(100 * Math.abs(row[i]) / total).toFixed(1)}% of the absolute scores`;
      const span = el("span", { class: shade(row[i], scale), onpointerleave: hideCard,
        onpointerenter: () => showCard(span, [el("div", { class: "token" }, token), el("div", { class: "place" }, told)]) },
      written(token));
      return span;
    }));
  }
  show(scores.length === 1 && !response.length ? scores[0] : importance);
  return el("article", {}, el("header", {}, ...about.map((part) => el("span", {}, part))), text,
    response.length ? el("div", { class: "row scores" }, ...buttons) : null);
}

theme();
dark.addEventListener("change", theme);
addEventListener("scroll", placeCard, { passive: true });
document.getElementById("main").append(...JSON.parse(document.getElementById("records").textContent).map(scored));
