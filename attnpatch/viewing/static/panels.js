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

function fillRowPanel(one, kind, sequence, row, order, cursor, choose) {
  const [bars, list, note] = ["row-bars", "row-list", "row-note"].map((id) => document.getElementById(id));
  const labels = sequence.key.labels;
  document.getElementById("row-hint").hidden = row !== null;
  document.getElementById("order").hidden = row === null;
  bars.hidden = row === null || order === "sorted";
  list.hidden = row === null || order !== "sorted";
  note.textContent = "";
  rowFrame = null;
  const title = row === null ? "What a row attends to" : `What ${shortened(oneLine(sequence.query.labels[row]), 60)} attends to`;
  document.getElementById("row-title").textContent = title;
  if (row === null) return list.replaceChildren();
  const values = Array.from({ length: one.columns }, (_, column) => valueAt(one, kind, row, column));
  const current = cursor && cursor.row === row ? cursor.column : null;
  const notes = [];
  if (order === "sorted") notes.push(listLargest(list, labels, values, one.signed, current, choose));
  else rowFrame = barChart(bars, labels.map(oneLine), values, one.signed, current);
  const total = values.reduce((sum, value) => sum + value, 0);
  if (kind === "none" && !one.signed && total < 0.999 && sequence.query.sizes[row] > 0) {
    notes.push(`The row sums to ${shown(total)}: the rest of its attention is on learned sinks or on tokens outside every block.`);
  }
  note.textContent = notes.filter(Boolean).join(" ");
}

// Fill the list with named bars, largest first; returns a note about the blocks that are not listed.
function listLargest(list, labels, values, signed, current, choose) {
  const sizes = values.map((value) => sizeOf(value, signed));
  const places = values.map((_, column) => column).filter((column) => sizes[column] > 0);
  places.sort((a, b) => sizes[b] - sizes[a] || a - b);
  const most = sizes[places[0]] ?? 1;
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.column : null;
  const scrolled = list.scrollTop;
  const items = places.slice(0, LISTED).map((column) => {
    const button = make("button", column === current ? "current" : "");
    button.type = "button";
    button.dataset.column = column;
    const track = make("span", "track");
    const fill = make("span", signed ? `fill ${values[column] < 0 ? "down" : "up"}` : "fill");
    fill.style.width = `${(100 * sizes[column]) / most}%`;
    track.append(fill);
    const name = oneLine(labels[column]);
    const label = make("span", "name", name);
    label.title = name.slice(0, 200);
    button.append(label, track, make("span", "number", shown(values[column])));
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
  const rest = places.slice(LISTED).reduce((sum, column) => sum + values[column], 0);
  return `The ${LISTED} largest of ${labels.length} blocks; the others sum to ${shown(rest)}.`;
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
