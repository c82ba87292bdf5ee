// Beside the map: a second map of the page, and small maps of all heads.

const secondChoice = document.getElementById("second");
const headsBox = document.getElementById("heads");
const headsPanel = document.getElementById("heads-panel");
const HEAD_SIDE = 96; // pixels of a small map
let besides = 0;

// A canvas of a plane, whose longer side has about `longest` pixels. A pixel of several cells shows the largest of them.
function smallMap(canvas, one, top, longest) {
  const { normalization, scale } = state;
  const part = Math.min(1, longest / Math.max(one.rows, one.columns));
  const [columns, rows] = [one.columns, one.rows].map((count) => Math.max(1, Math.floor(count * part)));
  const values = valuesOf(one, normalization);
  const cells = make("canvas");
  [cells.width, cells.height] = [columns, rows];
  cells.getContext("2d").putImageData(imageOf(one, values, top, scale, columns, rows), 0, 0);
  // Few cells are enlarged, so that a mark is thinner than they are.
  const times = Math.max(1, Math.floor(longest / Math.max(rows, columns)));
  [canvas.width, canvas.height] = [columns * times, rows * times];
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(cells, 0, 0, canvas.width, canvas.height);
}

// ---- the second map

// Where the second map has what the first one shows: {map, sequence, step, layer, head}; null if it lacks the layer or step.
function besideAt() {
  const map = maps[Number(secondChoice.value)];
  const at = { map: Number(secondChoice.value), sequence: Math.min(state.sequence, map.sequences.length - 1) };
  for (const axis of AXES) {
    const names = map[axisOf[axis]];
    at[axis] = Math.max(names.indexOf(named(axis)), axis === "head" || names.length === 1 ? 0 : -1);
    if (at[axis] < 0) return null;
  }
  return at;
}

async function drawSecond(mine) {
  const panel = document.getElementById("second-panel");
  const isShown = secondChoice.value !== "";
  panel.hidden = !isShown;
  if (!isShown) return;
  const [canvas, list, note] = ["second-map", "second-list", "second-note"].map((id) => document.getElementById(id));
  const map = maps[Number(secondChoice.value)];
  document.getElementById("second-title").textContent = shortened(map.name, 60);
  const at = besideAt();
  canvas.hidden = list.hidden = !at;
  if (!at) return void (note.textContent = `It has no layer ${named("layer")}${state.step ? ` at step ${named("step")}` : ""}.`);
  const one = await plane(at);
  if (mine !== besides) return;
  const sequence = map.sequences[at.sequence];
  const kind = state.normalization;
  // The scale of the first map, so that the same colour is the same number in both.
  smallMap(canvas, one, painted.top, 800);
  const beyond = largestOf(valuesOf(one, kind), one.signed) > painted.top ? " Numbers beyond the scale have its last colour." : "";
  const { query, key } = theSequence();
  const row = state.row === null ? -1 : sameBlock(query.labels, sequence.query.labels, state.row);
  const column = state.cursor ? sameBlock(key.labels, sequence.key.labels, state.cursor.column) : -1;
  markSmall(canvas, one, row, column);
  const layer = map.layers.length > 1 ? `Layer ${map.layers[at.layer] === "mean" ? "mean" : map.layers[at.layer]}. ` : "";
  list.hidden = row < 0;
  if (row < 0) return void (note.textContent = `${layer}It has no block of the selected row.${beyond}`);
  const values = Array.from({ length: one.columns }, (_, c) => valueAt(one, kind, row, c));
  const here = state.cursor && valueAt(current, kind, state.cursor.row, state.cursor.column);
  const both = column < 0 ? "" : `The cell: ${shown(here)} in the first map, ${shown(values[column])} here. `;
  const rest = listLargest(list, sequence.key, { values, signed: one.signed, current: column }, (chosen) => {
    const same = sameBlock(sequence.key.labels, key.labels, chosen);
    if (same >= 0) select({ row: state.row, column: same }, state.row);
  });
  note.textContent = layer + both + rest + beyond;
  canvas.setAttribute("aria-label", `Second map: ${map.name}. ${both}`);
}

function markSmall(canvas, one, row, column) {
  if (row < 0) return;
  const context = canvas.getContext("2d");
  const [x, y] = [(column + 0.5) * (canvas.width / one.columns), (row + 0.5) * (canvas.height / one.rows)];
  const size = Math.max(3, canvas.width / 50);
  context.strokeStyle = themeColour("mark");
  context.lineWidth = Math.max(1, canvas.width / 200);
  context.beginPath();
  if (column >= 0) context.arc(x, Math.min(canvas.height - size / 2, y), size, 0, 7);
  context.stroke();
}

// ---- all heads

async function drawHeads(mine) {
  const { heads } = theMap();
  headsPanel.hidden = heads.length < 2;
  if (headsPanel.hidden || !headsPanel.open) return;
  const positions = heads.map((_, position) => position).slice(1);
  const planes = await Promise.all(positions.map((head) => plane({ ...state, head })));
  if (mine !== besides) return;
  const kind = state.normalization;
  const top = Math.max(...planes.map((one) => largestOf(valuesOf(one, kind), one.signed)));
  if (headsBox.children.length !== positions.length) headsBox.replaceChildren(...positions.map(headButton));
  planes.forEach((one, i) => {
    const button = headsBox.children[i];
    const found = state.row === null ? null : strongestOf(one, kind, state.row);
    const place = found ? `${shown(found.value)} on ${shortened(oneLine(theSequence().key.labels[found.column]), 24)}` : "";
    smallMap(button.querySelector("canvas"), one, top, HEAD_SIDE);
    button.querySelector("b").textContent = `head ${heads[positions[i]]}`;
    button.querySelector("small").textContent = place;
    button.setAttribute("aria-pressed", String(state.head === positions[i]));
  });
}

function headButton(position) {
  const button = make("button", "head");
  button.type = "button";
  const canvas = make("canvas");
  canvas.setAttribute("aria-hidden", "true");
  button.append(canvas, make("b"), " ", make("small"));
  button.addEventListener("click", () => {
    setAxis("head", state.head === position ? 0 : position); // once more: the mean
    refresh();
  });
  return button;
}

// The other block to which a row attends most.
function strongestOf(one, kind, row) {
  const own = columnOfRow(theSequence(), row);
  let found = null;
  for (let column = 0; column < one.columns; column++) {
    const value = valueAt(one, kind, row, column);
    if (column !== own && sizeOf(value, one.signed) > sizeOf(found?.value ?? 0, one.signed)) found = { column, value };
  }
  return found;
}

function drawBesides() {
  const mine = ++besides;
  drawSecond(mine);
  drawHeads(mine);
}

// The second map is chosen among the others.
function offerSeconds() {
  const others = maps.map((map, i) => [map.name, i]).filter(([, i]) => i !== state.map);
  const before = secondChoice.value;
  secondChoice.replaceChildren(new Option("none", ""), ...others.map(([name, i]) => new Option(name, i)));
  secondChoice.value = others.some(([, i]) => String(i) === before) ? before : "";
}

secondChoice.addEventListener("change", drawBesides);
headsPanel.addEventListener("toggle", drawBesides);
