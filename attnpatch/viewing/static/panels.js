// The panels beside the map: tooltip, the bars of a row, the profile over the layers, the cell with its texts.
// Texts of conversations are inserted as text, never as HTML.

const tooltip = document.getElementById("tooltip");
const IN_TOOLTIP = 400; // most characters of a text in the tooltip
const LISTED = 40; // most bars in the list

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function showTooltip(x, y, parts) {
  tooltip.replaceChildren(...parts);
  tooltip.hidden = false;
  const { width, height } = tooltip.getBoundingClientRect();
  const [right, bottom] = [document.documentElement.clientWidth, window.innerHeight];
  const left = x + 18 + width <= right - 8 ? x + 18 : x - 18 - width;
  const above = y + 18 + height <= bottom - 8 ? y + 18 : y - 18 - height;
  tooltip.style.left = `${Math.max(8, Math.min(left, right - width - 8))}px`;
  tooltip.style.top = `${Math.max(8, Math.min(above, bottom - height - 8))}px`;
}

function hideTooltip() {
  tooltip.hidden = true;
}

function blockName(side, index) {
  const size = side.sizes[index];
  return `${oneLine(side.labels[index])} (${size} token${size === 1 ? "" : "s"})`;
}

// A short description of a cell: its number and its two blocks.
function aboutCell(value, kind, sequence, { row, column }) {
  const parts = [make("span", "value", shown(value)), make("span", "what", ` ${meaningOf(kind, theMap().signed)}`)];
  for (const [word, side, index] of [["row", sequence.query, row], ["column", sequence.key, column]]) {
    parts.push(make("div", "label", `${word}: ${shortened(blockName(side, index), 120)}`));
    if (side.texts?.[index]) parts.push(make("div", "words", shortened(side.texts[index], IN_TOOLTIP)));
  }
  return parts;
}

function fillCellPanel(value, kind, sequence, cursor) {
  document.getElementById("cell-hint").hidden = cursor !== null;
  document.getElementById("cell").hidden = cursor === null;
  if (!cursor) return;
  const { row, column } = cursor;
  document.getElementById("cell-value").textContent = shown(value);
  document.getElementById("cell-meaning").textContent = meaningOf(kind, theMap().signed);
  for (const [id, word, side, index] of [["cell-query", "row", sequence.query, row], ["cell-key", "column", sequence.key, column]]) {
    document.getElementById(`${id}-label`).textContent = `${word}: ${blockName(side, index)}`;
    const text = side.texts?.[index] ?? "";
    const box = document.getElementById(id);
    if (box.textContent !== text) box.textContent = text;
    box.hidden = !text;
  }
}

let rowFrame = null;

// The numbers of a row: {values, one per column}, and with `notes` a few words for each.
function fillRowPanel(one, sequence, shownRow, choose) {
  const { row, order, cursor, normalization } = shownRow;
  const [bars, list, note] = ["row-bars", "row-list", "row-note"].map((id) => document.getElementById(id));
  document.getElementById("row-hint").hidden = row !== null;
  document.getElementById("order").hidden = row === null;
  bars.hidden = row === null || order !== "order";
  list.hidden = row === null || order === "order";
  note.textContent = "";
  rowFrame = null;
  const title = row === null ? "What a row attends to" : `What ${shortened(oneLine(sequence.query.labels[row]), 60)} attends to`;
  document.getElementById("row-title").textContent = title;
  if (row === null) return list.replaceChildren();
  const values = shownRow.values ?? Array.from({ length: one.columns }, (_, column) => valueAt(one, normalization, row, column));
  const current = cursor && cursor.row === row ? cursor.column : null;
  const said = [];
  if (order === "order") rowFrame = barChart(bars, sequence.key.labels.map(oneLine), values, one.signed, current);
  else said.push(listLargest(list, sequence.key, { values, notes: shownRow.notes, signed: one.signed, current }, choose));
  const total = values.reduce((sum, value) => sum + value, 0);
  const isOfMass = normalization === "none" && !one.signed && !theMap().numbers && !shownRow.notes;
  if (isOfMass && total < 0.999 && sequence.query.sizes[row] > 0) {
    said.push(`The row sums to ${shown(total)}: the rest of its attention is on learned sinks or on tokens outside every block.`);
  }
  note.textContent = said.filter(Boolean).join(" ");
}

// For each column the row's largest number over the layers, and the layer's position among the planes.
function largestOverLayers(planes, kind, row) {
  const { columns, signed } = planes[0];
  const [values, layers] = [new Array(columns).fill(0), new Array(columns).fill(0)];
  planes.forEach((one, layer) => {
    for (let column = 0; column < columns; column++) {
      const value = valueAt(one, kind, row, column);
      if (sizeOf(value, signed) > sizeOf(values[column], signed)) [values[column], layers[column]] = [value, layer];
    }
  });
  return { values, layers };
}

// One bar of the list: a block's name, its number and its text.
function listedBar(side, column, value, most, { signed, current, notes }) {
  const button = make("button", column === current ? "current" : "");
  button.type = "button";
  button.dataset.column = column;
  const track = make("span", "track");
  const fill = make("span", signed ? `fill ${value < 0 ? "down" : "up"}` : "fill");
  fill.style.width = `${(100 * sizeOf(value, signed)) / most}%`;
  track.append(fill);
  const name = oneLine(side.labels[column]);
  const label = make("span", "name", name);
  label.title = name.slice(0, 200);
  if (notes) label.append(" ", make("small", "", notes[column]));
  button.append(label, track, make("span", "number", shown(value)));
  const text = oneLine((side.texts?.[column] ?? "").slice(0, 400));
  if (text && text !== name) button.append(make("span", "words", shortened(text, 120)));
  return button;
}

// Fill the list with named bars, largest first; returns a note about the blocks that are not listed.
function listLargest(list, side, row, choose) {
  const { values, signed } = row;
  const sizes = values.map((value) => sizeOf(value, signed));
  const places = values.map((_, column) => column).filter((column) => sizes[column] > 0);
  places.sort((a, b) => sizes[b] - sizes[a] || a - b);
  const most = sizes[places[0]] ?? 1;
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.column : null;
  const scrolled = list.scrollTop;
  const items = places.slice(0, LISTED).map((column) => {
    const button = listedBar(side, column, values[column], most, row);
    button.addEventListener("click", () => choose(column));
    const item = make("li");
    item.append(button);
    return item;
  });
  list.replaceChildren(...items);
  list.scrollTop = scrolled;
  if (focused !== null) list.querySelector(`[data-column="${focused}"]`)?.focus({ preventScroll: true });
  if (!places.length) return "The whole row is 0.";
  if (places.length <= LISTED) return "";
  if (row.notes) return `The ${LISTED} largest of ${values.length} blocks.`;
  const rest = places.slice(LISTED).reduce((sum, column) => sum + values[column], 0);
  return `The ${LISTED} largest of ${values.length} blocks; the others sum to ${shown(rest)}.`;
}

const WHOLE = {
  own: ["on the row's own block", "accent"],
  first: ["on the first block", "second"],
  largest: ["on the block each row attends to most", "third"],
};
const LARGEST_SIGNED = "on the block of each row's largest number, whatever its sign";

let profileFrame = null;

function drawProfile(title, names, lines, current) {
  document.getElementById("profile-title").textContent = title;
  const canvas = document.getElementById("profile");
  profileFrame = lineChart(canvas, names, lines, current);
  profileFrame.lines = lines;
  profileFrame.names = names;
  const range = (line) => {
    const values = line.values.filter(Number.isFinite);
    return values.length ? `${shown(Math.min(...values))} to ${shown(Math.max(...values))}` : "no number";
  };
  canvas.setAttribute("aria-label", `${title}: ${lines.map((line) => `${line.name} ${range(line)}`).join("; ")}`);
  document.getElementById("profile-key").replaceChildren(...lines.map((line, i) => {
    const item = make("li");
    const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const stroke = document.createElementNS("http://www.w3.org/2000/svg", "path");
    for (const [name, value] of [["width", 30], ["height", 10], ["aria-hidden", "true"]]) picture.setAttribute(name, value);
    const looks = [["d", "M1 5H29"], ["fill", "none"], ["stroke-width", 2], ["stroke-dasharray", DASHES[i].join(" ") || "none"]];
    for (const [name, value] of [...looks, ["stroke", themeColour(line.colour)]]) stroke.setAttribute(name, value);
    picture.append(stroke);
    item.append(picture, make("span", "", line.name));
    return item;
  }));
}
