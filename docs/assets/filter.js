// A field above the table of methods that shows only the rows which contain all its words.
document$.subscribe(() => {
  if (!location.pathname.endsWith("/methods.html")) return;
  const table = document.querySelector("article table");
  const field = Object.assign(document.createElement("input"), {
    type: "search",
    id: "method-filter",
    placeholder: "Filter: objective, stage, required input, arXiv id ...",
    ariaLabel: "Filter the methods",
  });
  const count = Object.assign(document.createElement("output"), { id: "method-count" });
  const rows = [...table.tBodies[0].rows].map((row) => [row, row.textContent.toLowerCase()]);
  const show = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [row, text] of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} methods`;
  };
  field.addEventListener("input", show);
  (table.closest(".md-typeset__scrollwrap") ?? table).before(field, count);
  show();
});
