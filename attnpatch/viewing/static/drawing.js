// Canvases at the screen's resolution, shortened text, and the two charts.

const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif';
const font = (size, weight = "") => `${weight} ${size}px ${FONT}`.trim();

// Set a canvas's size in CSS pixels and clear it; returns a context that draws in CSS pixels.
function sized(canvas, width, height) {
  const density = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * density));
  canvas.height = Math.max(1, Math.round(height * density));
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(density, 0, 0, density, 0, 0);
  return context;
}

// The text, cut at its end to fit the width.
function fitted(context, text, width) {
  const line = oneLine(text.slice(0, 200));
  if (context.measureText(line).width <= width) return line;
  const letters = Array.from(line);
  let [low, high] = [0, letters.length];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    const fits = context.measureText(letters.slice(0, middle).join("") + "\u2026").width <= width;
    if (fits) low = middle;
    else high = middle - 1;
  }
  return low ? letters.slice(0, low).join("").trimEnd() + "\u2026" : "";
}

// The smallest step of 1, 2, 5, 10, ... at which labels are at least `needed` pixels apart.
function labelStep(distance, needed) {
  if (!(distance > 0)) return Infinity;
  for (let power = 1; ; power *= 10) {
    for (const step of [1, 2, 5]) if (step * power * distance >= needed) return step * power;
  }
}

// Three to six round numbers, from 0 to at least the top.
function roundTicks(top) {
  if (!(top > 0)) return [0, 1];
  const power = 10 ** Math.floor(Math.log10(top));
  const step = [0.2, 0.5, 1, 2].map((part) => part * power).find((part) => top / part <= 5) ?? 2 * power;
  const ticks = [];
  for (let i = 0; i === 0 || ticks[i - 1] < top * 0.9999; i++) ticks.push(Number((i * step).toPrecision(6)));
  return ticks;
}

// The least and the greatest of some values and 0.
function rangeOf(values) {
  const numbers = values.filter(Number.isFinite);
  return [Math.min(0, ...numbers), Math.max(0, ...numbers)];
}

// Draw the frame of a chart: values upwards, positions across. Returns its geometry.
function chartFrame(canvas, height, [low, top], positions) {
  const width = Math.max(120, canvas.parentElement.clientWidth - 28); // a window may have no room at all
  const context = sized(canvas, width, height);
  const ticks = roundTicks(Math.max(top, -low));
  if (low < 0) {
    const above = ticks.filter((tick, i) => i === 0 || ticks[i - 1] < top);
    const below = ticks.filter((tick, i) => i > 0 && ticks[i - 1] < -low);
    ticks.splice(0, ticks.length, ...below.reverse().map((tick) => -tick), ...above);
  }
  context.font = font(12);
  const names = ticks.map((tick) => compact(tick));
  const left = Math.ceil(Math.max(...names.map((name) => context.measureText(name).width))) + 8;
  const box = { left, top: 8, right: width - 6, bottom: height - 22 };
  const [lowest, highest] = [ticks[0], ticks[ticks.length - 1]];
  const y = (value) => box.bottom - ((value - lowest) / (highest - lowest)) * (box.bottom - box.top);
  context.textBaseline = "middle";
  context.textAlign = "right";
  context.lineWidth = 1;
  ticks.forEach((tick, i) => {
    context.strokeStyle = themeColour("line");
    context.beginPath();
    context.moveTo(box.left, Math.round(y(tick)) + 0.5);
    context.lineTo(box.right, Math.round(y(tick)) + 0.5);
    context.stroke();
    context.fillStyle = themeColour("quiet");
    context.fillText(names[i], box.left - 6, y(tick));
  });
  const slot = (box.right - box.left) / Math.max(1, positions.length);
  const x = (position) => box.left + (position + 0.5) * slot;
  context.textAlign = "center";
  context.textBaseline = "top";
  const widest = Math.max(...positions.map((name) => Math.min(70, context.measureText(name).width)), 8);
  const step = labelStep(slot, widest + 10);
  for (let i = 0, free = 0; i < positions.length; i += step) {
    const name = fitted(context, positions[i], Math.max(70, step * slot - 10));
    const half = context.measureText(name).width / 2;
    const middle = Math.max(half, Math.min(x(i), width - half));
    // The last label is moved in from the edge; skip it if it would overlap the one before.
    if (middle - half < free) continue;
    context.fillText(name, middle, box.bottom + 6);
    free = middle + half + 8;
  }
  const at = (px) => Math.floor((px - box.left) / slot);
  return { context, box, slot, x, y, at };
}

const DASHES = [[], [7, 4], [2, 3]];

// Lines over positions; positions without a number are skipped.
function lineChart(canvas, positions, lines, current) {
  const frame = chartFrame(canvas, 170, rangeOf(lines.flatMap((line) => line.values)), positions);
  const { context, box, x, y } = frame;
  if (current !== null) {
    context.fillStyle = themeColour("line");
    context.fillRect(x(current) - 1, box.top, 2, box.bottom - box.top);
  }
  lines.forEach((line, i) => {
    context.strokeStyle = context.fillStyle = themeColour(line.colour);
    context.lineWidth = 2;
    context.setLineDash(DASHES[i]);
    context.beginPath();
    line.values.forEach((value, p) => Number.isFinite(value) && context.lineTo(x(p), y(value)));
    context.stroke();
    context.setLineDash([]);
    line.values.forEach((value, p) => {
      if (!Number.isFinite(value)) return;
      context.beginPath();
      context.arc(x(p), y(value), p === current ? 4.5 : positions.length > 40 ? 1.5 : 2.5, 0, 7);
      context.fill();
    });
  });
  return frame;
}

// One bar per position, at least a pixel wide; the current one is highlighted.
function barChart(canvas, positions, values, signed, current) {
  const frame = chartFrame(canvas, 190, rangeOf(values), positions);
  const { context, slot, x, y } = frame;
  const width = Math.max(1, slot > 4 ? slot * 0.8 : slot);
  values.forEach((value, i) => {
    if (!(sizeOf(value, signed) > 0)) return;
    const colour = signed ? (value < 0 ? "down" : "up") : "bar";
    context.fillStyle = themeColour(i === current ? "mark" : colour);
    context.fillRect(x(i) - width / 2, Math.min(y(value), y(0)), width, Math.abs(y(0) - y(value)));
  });
  return frame;
}
