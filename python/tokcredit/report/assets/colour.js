// Diverging colours: blue above zero, orange below, zero is the page itself. Twelve steps either way.

function level(x, scale) {
  return x ? Math.ceil(Math.min(1, Math.abs(x) / scale) * 12) : 0;
}

function shade(x, scale) {
  const step = level(x, scale);
  return step ? (x > 0 ? "p" : "n") + step : "";
}

function paint(x, scale) {
  const style = getComputedStyle(document.documentElement);
  const rgb = style.getPropertyValue(x > 0 ? "--pos" : "--neg");
  return `rgb(${rgb} / ${(level(x, scale) * 0.075).toFixed(3)})`;
}

// For bands, which must be seen at their middle too: from grey at `middle` to either end of [low, high].
function mixed(x, range) {
  const share = Math.round(strength(x, range) * 100);
  return `color-mix(in oklab, rgb(var(${x < range[1] ? "--neg" : "--pos"})) ${share}%, var(--neutral))`;
}

function strength(x, [low, middle, high]) {
  const room = x < middle ? middle - low : high - middle;
  return room > 0 ? Math.min(1, Math.abs(x - middle) / room) : 0;
}

function span(rewards, middle) {
  return [Math.min(...rewards), middle, Math.max(...rewards)];
}
