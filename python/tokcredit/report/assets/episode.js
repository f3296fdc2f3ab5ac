// The turns of an episode. The heading of a turn links to the other turns of the group that began in the same state.

const LINKS = 8;

// The turns of the group that began in a state, those after `own` first.
function recurrences(group, own) {
  const all = group.rows.flatMap((row) => row.turns.map((turn, number) => ({ row, turn, number })));
  const same = all.filter(({ turn }) => turn.state === own.state), at = same.findIndex(({ turn }) => turn === own);
  return own.state < 0 ? [] : [...same.slice(at + 1), ...same.slice(0, at)];
}

// What stands above the token at which a turn begins, or at which a tool or the environment answers, else null.
function turnHeading(page, row, position) {
  const number = row.turns.findIndex(({ begin }) => begin === position), turn = row.turns[number];
  const answers = !turn && position < row.length && row.turns.some(({ end }) => end === position);
  if (!turn) return answers ? el("h5", {}, "tool or environment") : null;
  const others = recurrences(page.group, turn);
  const links = others.slice(0, LINKS).map((other) => {
    const where = `rollout ${other.row.number + 1}, turn ${other.number + 1}`;
    return el("button", { type: "button", "aria-label": `Same state in ${where}`,
      onclick: (event) => { event.stopPropagation(); page.visit(other.row, other.turn.begin); } }, where);
  });
  const more = others.length > LINKS ? ` and ${others.length - LINKS} more` : null;
  return el("h5", { "data-turn": number }, `Turn ${number + 1}`,
    turn.reward === null ? null : ` · reward ${plain(turn.reward)}`,
    others.length ? ` · state ${turn.state + 1}, also ` : null, ...links, more);
}

// The answer to a turn that ends here, if the rollout does not have its tokens.
function answerText(row, position) {
  const turn = row.turns.find(({ end }) => end === position);
  if (!turn?.answer || (position < row.length && isAnswer(row, position))) return [];
  return [el("h5", {}, "tool or environment"), el("p", { class: "answer" }, turn.answer)];
}

// Whether a token is no part of a turn and follows one.
function isAnswer(row, position) {
  const before = row.turns.findLast(({ begin }) => begin <= position);
  return before !== undefined && position >= before.end;
}
