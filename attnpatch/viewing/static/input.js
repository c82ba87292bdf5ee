// Input: pointer, keys, theme, window size.

// ---- pointer

let drag = null;

function within(event) {
  const { left, top } = frameElement.getBoundingClientRect();
  return cellAt(event.clientX - left, event.clientY - top, state.zoom);
}

frameElement.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  const { zoom } = state;
  drag = { x: event.clientX, y: event.clientY, row: zoom.row, column: zoom.column, moved: false };
});

frameElement.addEventListener("pointermove", (event) => {
  const { zoom } = state;
  if (drag && event.buttons && zoom.factor > 1) {
    const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
    if (!drag.moved && Math.hypot(dx, dy) > 5) {
      drag.moved = true;
      frameElement.setPointerCapture(event.pointerId);
    }
    if (drag.moved) {
      zoom.row = drag.row - dy / place.cellHeight;
      zoom.column = drag.column - dx / place.cellWidth;
      keepInside(zoom);
      hideTooltip();
      return void refresh();
    }
  }
  if (event.pointerType === "touch" || !current) return;
  const cell = within(event);
  if (cell) showTooltip(event.clientX, event.clientY, aboutCell(valueAt(current, state.normalization, cell.row, cell.column), state.normalization, theSequence(), cell));
  else hideTooltip();
  if (cell?.row !== state.hover?.row || cell?.column !== state.hover?.column) {
    state.hover = cell;
    drawMarks(zoom, state);
  }
});

frameElement.addEventListener("pointerup", (event) => {
  const clicked = drag && !drag.moved && current && within(event);
  drag = null;
  if (clicked) select(clicked, clicked.row);
});

frameElement.addEventListener("pointerleave", () => {
  hideTooltip();
  state.hover = null;
  if (current) drawMarks(state.zoom, state);
});
frameElement.addEventListener("pointercancel", () => (drag = null));

frameElement.addEventListener("wheel", (event) => {
  // A pinch on a touch pad arrives as a wheel event with Ctrl; a plain wheel scrolls the page.
  if (!event.ctrlKey) return;
  event.preventDefault();
  const cell = within(event);
  if (cell) zoomTo(event.deltaY < 0 ? state.zoom.factor * 2 : state.zoom.factor / 2, cell);
}, { passive: false });

function onChart(canvas, frame, pick, say) {
  canvas.addEventListener("pointermove", (event) => {
    const position = frame()?.at(event.offsetX);
    const parts = position >= 0 ? say(position) : null;
    if (parts) showTooltip(event.clientX, event.clientY, parts);
    else hideTooltip();
  });
  canvas.addEventListener("pointerleave", hideTooltip);
  canvas.addEventListener("click", (event) => {
    const position = frame()?.at(event.offsetX);
    if (position >= 0 && say(position)) pick(position);
  });
}

onChart(byId("profile"), () => profileFrame, (position) => {
  setAxis("layer", realLayers()[position]);
  refresh();
}, (position) => {
  if (position >= profileFrame.names.length) return null;
  const lines = profileFrame.lines.map((line) => make("div", "", `${shown(line.values[position] ?? NaN)} ${line.name}`));
  return [make("div", "label", `layer ${profileFrame.names[position]}`), ...lines];
});

onChart(byId("row-bars"), () => rowFrame, (column) => select({ row: state.row, column }, state.row), (column) => {
  if (column >= current.columns) return null;
  const cell = { row: state.row, column };
  return aboutCell(valueAt(current, state.normalization, state.row, column), state.normalization, theSequence(), cell);
});

// ---- keys

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

frameElement.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !current) return;
  const { cursor } = state;
  const { rows, columns } = current;
  const inside = (position, count) => Math.max(0, Math.min(count - 1, position));
  if (event.key in MOVES) {
    const [down, right] = MOVES[event.key].map((by) => by * (event.shiftKey ? 10 : 1));
    const next = cursor ? { row: inside(cursor.row + down, rows), column: inside(cursor.column + right, columns) } : { row: rows - 1, column: 0 };
    select(next);
  } else if (event.key === "Home" || event.key === "End") {
    select({ row: cursor?.row ?? rows - 1, column: event.key === "Home" ? 0 : columns - 1 });
  } else if (event.key === "Enter") {
    if (cursor) select(cursor, cursor.row);
  } else return;
  event.preventDefault();
  hideTooltip();
});

document.addEventListener("keydown", (event) => {
  // Some keyboards type brackets with AltGr, which is reported as Ctrl too.
  const shortcut = (event.ctrlKey && !event.getModifierState("AltGraph")) || event.metaKey;
  if (shortcut || event.target.closest("select")) return;
  const steps = { "[": ["layer", -1], "]": ["layer", 1], "{": ["head", -1], "}": ["head", 1] };
  if (event.key in steps) {
    const [axis, by] = steps[event.key];
    setAxis(axis, state[axis] + by);
    refresh();
  } else if (event.key === "Escape") {
    hideTooltip();
    if (state.row !== null) select(state.cursor, null);
    else if (state.cursor) select(null, null);
  } else if (event.key === "+" || event.key === "=") zoomTo(state.zoom.factor * 2);
  else if (event.key === "-") zoomTo(state.zoom.factor / 2);
  else if (event.key === "0") zoomTo(1);
});

// ---- theme and size

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = false;
setTheme(prefersDark.matches ? "dark" : "light");
prefersDark.addEventListener("change", () => {
  if (chosenTheme) return;
  setTheme(prefersDark.matches ? "dark" : "light");
  refresh();
});
byId("theme").addEventListener("click", () => {
  chosenTheme = true;
  setTheme(isDark() ? "light" : "dark");
  refresh();
});

let width = document.documentElement.clientWidth;
let resizing = 0;
window.addEventListener("resize", () => {
  // On phones the height changes with every scroll, because the address bar appears and disappears.
  if (document.documentElement.clientWidth === width) return;
  width = document.documentElement.clientWidth;
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(refresh);
});
