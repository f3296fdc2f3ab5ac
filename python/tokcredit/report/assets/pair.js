// A pair of responses: what both begin with once, then the rest of the chosen one beside that of the rejected one.

const COMMON = "Both begin with";

// The parts of a pair with their first token, their end and their name, or null for other groups.
function pairParts(group) {
  if (!METHODS.some(hasMargin) || group.rows.length !== 2) return null;
  const [chosen, rejected] = group.rows.toSorted((a, b) => b.reward - a.reward);
  const shared = chosen.path.filter((v) => rejected.path.includes(v));
  const common = shared.reduce((n, v) => n + group.nodes.length[v], 0);
  const parts = [[chosen, common, chosen.length, "Chosen"], [rejected, common, rejected.length, "Rejected"]];
  return common ? [[chosen, 0, common, COMMON], ...parts] : parts;
}

function marginText(group, methods) {
  const known = methods.filter((m) => hasMargin(m) && group.methods[m].margin !== null);
  return known.map((m) => `margin ${plain(group.methods[m].margin)}${methods.length > 1 ? ` (${m})` : ""}`).join(", ");
}
