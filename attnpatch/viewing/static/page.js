// The page's state, and the controls that change it.

const byId = (id) => document.getElementById(id);
const AXES = ["step", "layer", "head"];
const MANY = 100; // blocks
const NUMBERS = { none: "mass", row: "share of the row", density: "mass per key token", column: "share of the column" };
const SIGNED_NUMBERS = {
  none: "probability \u00d7 gradient", row: "share of the row's absolute sum", density: "probability \u00d7 gradient per key token",
  column: "share of the column's absolute sum",
};
const axisOf = { step: "steps", layer: "layers", head: "heads" };

const state = {
  map: 0, sequence: 0, step: 0, layer: 0, head: 0, normalization: "none", scale: "sqrt", order: "sorted",
  row: null, cursor: null, hover: null, zoom: { factor: 1, row: 0, column: 0 },
};
let current = null; // the plane that is drawn
let asked = 0;

const theMap = () => maps[state.map];
const theSequence = () => theMap().sequences[state.sequence];
const named = (axis) => theMap()[axisOf[axis]][state[axis]];

// Draw everything again. If several calls overlap, only the last one draws.
async function refresh() {
  const mine = ++asked;
  let one;
  try {
    one = await plane(state);
  } catch (error) {
    byId("trouble").textContent = error.message;
    byId("trouble").hidden = false;
    throw error;
  }
  if (mine !== asked) return;
  current = one;
  const { normalization, scale } = state;
  // Before the map, which takes the height that is left.
  fillFinding(theMap(), theSequence(), normalization === theMap().normalization, goTo);
  drawCells(one, theSequence(), normalization, scale, state.zoom, shownNow());
  drawLegend(scale, one.signed);
  mark();
  document.documentElement.dataset.shown = shownNow();
}

// The requested state in words; the root element's data-shown has the state that is drawn.
function shownNow() {
  const { normalization, scale } = state;
  return [planeId(state), normalization, scale, document.documentElement.dataset.theme].join(" ");
}

// Update everything that depends on the selected cell and row; the cells stay as drawn.
function mark() {
  const { normalization, cursor, row, order } = state;
  const value = cursor && valueAt(current, normalization, cursor.row, cursor.column);
  drawMarks(state.zoom, state);
  fillCellPanel(value, normalization, theSequence(), cursor);
  if (order !== "layers" || row === null) fillRowPanel(current, theSequence(), state, (column) => select({ row, column }, row));
  overLayers();
  drawBesides();
  drawPictures(current, theSequence(), state);
}

function goTo(row, column, layer) {
  Object.assign(state, { row, cursor: { row, column } });
  setAxis("layer", layer);
  refresh().then(speak);
}

// The positions of the layer slider without the mean.
function realLayers() {
  return theMap().layers.map((_, position) => position).slice(theMap().layers.length > 1 ? 1 : 0);
}

let profiled = 0;

const nextFrame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));

// What needs the numbers of all layers: the profile of the cell, and the row's largest numbers over all layers.
async function overLayers() {
  const mine = ++profiled;
  if (written === theSequence()) colourText(current, theSequence(), state);
  else nextFrame().then(() => mine === profiled && colourText(current, theSequence(), state));
  const { cursor, row, normalization, order } = state;
  const { signed } = theMap();
  const positions = realLayers();
  const names = positions.map((position) => String(theMap().layers[position]));
  const shownAt = positions.indexOf(state.layer);
  const chosen = shownAt < 0 ? null : shownAt;
  if (!cursor) {
    const measured = theSequence().profile[state.step][state.head];
    const lines = Object.keys(WHOLE).filter((name) => measured[name]).map((name) => {
      return { name: signed && name === "largest" ? LARGEST_SIGNED : WHOLE[name][0], colour: WHOLE[name][1], values: measured[name] };
    });
    return drawProfile(`Over the layers: ${signed ? "" : "mass, "}mean over all rows`, names, lines, chosen);
  }
  // The map first: inflating all layers would delay it.
  if (!positions.every((layer) => held.has(planeId({ ...state, layer })))) await nextFrame();
  if (mine !== profiled) return;
  const planes = await Promise.all(positions.map((layer) => plane({ ...state, layer })));
  if (mine !== profiled) return;
  if (order === "layers") {
    const best = largestOverLayers(planes, normalization, row);
    const choose = (column) => goTo(row, column, positions[best.layers[column]]);
    fillRowPanel(current, theSequence(), { ...state, ...best, notes: best.layers.map((at) => `layer ${names[at]}`) }, choose);
  }
  const values = planes.map((one) => valueAt(one, normalization, cursor.row, cursor.column));
  const { query, key } = theSequence();
  const name = `${shortened(oneLine(query.labels[cursor.row]), 30)} \u2192 ${shortened(oneLine(key.labels[cursor.column]), 30)}`;
  drawProfile("Over the layers: the cell", names, [{ name, colour: "accent", values }], chosen);
}

// Select a cell; and a row, if one is given.
function select(cursor, row = state.row) {
  if (!current) return;
  state.cursor = cursor;
  state.row = row;
  const { zoom } = state;
  if (cursor && zoom.factor > 1) {
    const reach = (start, count, position) => Math.max(position + 1 - count, Math.min(start, position));
    const before = [zoom.row, zoom.column];
    zoom.row = reach(zoom.row, place.rows / zoom.factor, cursor.row);
    zoom.column = reach(zoom.column, place.columns / zoom.factor, cursor.column);
    if (zoom.row !== before[0] || zoom.column !== before[1]) refresh();
  }
  mark();
  speak();
}

function speak() {
  const { cursor, row, normalization } = state;
  if (!cursor) return void (byId("spoken").textContent = "");
  const { query, key } = theSequence();
  const value = shown(valueAt(current, normalization, cursor.row, cursor.column));
  const selected = row === cursor.row ? ", row selected" : "";
  byId("spoken").textContent =
    `${shortened(oneLine(query.labels[cursor.row]), 60)} on ${shortened(oneLine(key.labels[cursor.column]), 60)}: ${value}${selected}`;
}

// ---- controls

function setAxis(axis, position) {
  const count = theMap()[axisOf[axis]].length;
  state[axis] = Math.max(0, Math.min(count - 1, position));
  byId(axis).value = state[axis];
  const name = named(axis);
  const text = name === "mean" && count > 1 ? `mean of ${count - 1}` : String(name);
  byId(`${axis}-name`).textContent = text;
  byId(axis).setAttribute("aria-valuetext", `${axis} ${text}`);
  state.hover = null;
  hideTooltip();
}

function openMap(index) {
  const map = maps[index];
  Object.assign(state, { map: index, sequence: 0, row: null, cursor: null, hover: null });
  for (const option of byId("normalization").options) {
    option.textContent = map.signed ? weightNamed(SIGNED_NUMBERS[option.value]) : NUMBERS[option.value];
  }
  offerSeconds();
  byId("signed-help").hidden = !map.gradient;
  byId("numbers-help").hidden = !(map.signed && map.numbers);
  byId("part-help").hidden = !map.part;
  setChoice("normalization", map.normalization);
  for (const axis of AXES) {
    const count = map[axisOf[axis]].length;
    byId(`${axis}-field`).hidden = count < 2;
    byId(axis).max = count - 1;
    setAxis(axis, 0);
  }
  byId("order").querySelector("[value=layers]").hidden = map.layers.length < 2;
  if (map.layers.length < 2 && state.order === "layers") setChoice("order", "sorted");
  byId("sequence-field").hidden = map.sequences.length < 2;
  byId("sequence").replaceChildren(...map.sequences.map((one, i) => new Option(one.name, i)));
  byId("facts-box").hidden = !Object.keys(map.facts).length;
  byId("facts").replaceChildren(...Object.entries(map.facts).map(([name, value]) => {
    const line = make("div");
    line.append(make("dt", "", name), make("dd", "", value));
    return line;
  }));
  openSequence(0);
}

// Opens on the last query row, its strongest layer and the block that gets the most there.
function openSequence(index) {
  Object.assign(state, { sequence: index, row: null, cursor: null, hover: null, zoom: { factor: 1, row: 0, column: 0 } });
  const { found } = theSequence();
  if (found) {
    const [layer, column] = found.cells[0];
    Object.assign(state, { row: found.row, cursor: { row: found.row, column } });
    setAxis("layer", layer);
  }
  current = null; // until the new numbers are inflated
  const { query, key } = theSequence();
  const layers = realLayers().length;
  byId("shape").textContent =
    `${query.labels.length} \u00d7 ${key.labels.length} blocks, ${layers} layer${layers === 1 ? "" : "s"}; rows attend to columns`
    + (theMap().uncertainty && `; ${theMap().uncertainty}`);
  // With many blocks most masses are so much smaller than the largest that a square root would show them all alike.
  setChoice("scale", Math.max(query.labels.length, key.labels.length) > MANY ? "log" : "sqrt");
  zoomTo(1);
}

function setChoice(name, value) {
  state[name] = byId(name).value = value;
}

function zoomTo(factor, around) {
  const { zoom } = state;
  const next = Math.max(1, Math.min(MOST_ZOOM, factor));
  if (place && current) {
    const [rows, columns] = [current.rows, current.columns];
    const at = around ?? state.cursor ?? { row: zoom.row + rows / zoom.factor / 2 - 0.5, column: zoom.column + columns / zoom.factor / 2 - 0.5 };
    const kept = zoom.factor / next; // the cell under the pointer stays there
    const onScreen = around ?? !state.cursor;
    zoom.row = onScreen ? at.row + 0.5 - (at.row + 0.5 - zoom.row) * kept : at.row + 0.5 - rows / next / 2;
    zoom.column = onScreen ? at.column + 0.5 - (at.column + 0.5 - zoom.column) * kept : at.column + 0.5 - columns / next / 2;
  }
  zoom.factor = next;
  byId("zoom-name").textContent = `${next}\u00d7`;
  byId("zoom-out").disabled = next === 1;
  byId("zoom-in").disabled = next === MOST_ZOOM;
  refresh();
}

byId("map-field").hidden = byId("second-field").hidden = maps.length < 2;
byId("map").replaceChildren(...maps.map((map, i) => new Option(map.name, i)));
if (maps.length === 1) document.querySelector("h1").textContent = shortened(maps[0].name, 60);
byId("map").addEventListener("change", (event) => openMap(Number(event.target.value)));
byId("sequence").addEventListener("change", (event) => openSequence(Number(event.target.value)));
for (const axis of AXES) {
  byId(axis).addEventListener("input", (event) => {
    setAxis(axis, Number(event.target.value));
    refresh();
  });
}
for (const name of ["normalization", "scale", "order"]) {
  byId(name).addEventListener("change", (event) => {
    state[name] = event.target.value;
    refresh();
  });
}
byId("zoom-in").addEventListener("click", () => zoomTo(state.zoom.factor * 2));
byId("zoom-out").addEventListener("click", () => zoomTo(state.zoom.factor / 2));
byId("help-button").addEventListener("click", () => {
  byId("help").hidden = !byId("help").hidden;
  byId("help-button").setAttribute("aria-expanded", String(!byId("help").hidden));
});
