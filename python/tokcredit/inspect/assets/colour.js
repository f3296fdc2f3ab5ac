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

// For lines, which must be seen where they are zero: from the river's grey to either end.
function mixed(x, scale) {
  const share = scale ? Math.round(Math.min(1, Math.abs(x) / scale) * 100) : 0;
  return `color-mix(in oklab, rgb(var(${x < 0 ? "--neg" : "--pos"})) ${share}%, var(--river))`;
}
