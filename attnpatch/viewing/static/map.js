// The map: a canvas of cells, a canvas of marks above it, and the cell at a point of the screen.

const frameElement = document.getElementById("frame");
const cellsCanvas = document.getElementById("cells");
const marksCanvas = document.getElementById("marks");
const LARGEST_CELL = 84;
const MOST_ZOOM = 64;

// Geometry in CSS pixels: the plot, and the size of its cells under the zoom.
let place = null;
let painted = { key: null, canvas: document.createElement("canvas"), top: 1 };

function layOut(one, sequence, zoom) {
  const width = Math.floor(document.getElementById("map-panel").clientWidth);
  const narrow = width < 500;
  const context = cellsCanvas.getContext("2d");
  context.font = font(12);
  const widest = (labels, most) =>
    Math.min(most, Math.ceil(Math.max(8, ...labels.map((label) => context.measureText(oneLine(label.slice(0, 60))).width))));
  const left = widest(sequence.query.labels, narrow ? 92 : 150) + 18;
  const below = widest(sequence.key.labels, narrow ? 92 : 110) + 14;
  // Open help must not make the map smaller.
  const help = document.getElementById("help").offsetHeight;
  const above = frameElement.getBoundingClientRect().top + window.scrollY - help;
  const height = Math.max(300, Math.min(window.innerHeight - above - 24, 1000) - below);
  const room = Math.max(20, width - left - 2); // a window may have no room at all
  let [cellWidth, cellHeight] = [room / one.columns, height / one.rows];
  const ratio = one.rows / one.columns;
  if (ratio <= 3 && ratio >= 1 / 3) cellWidth = cellHeight = Math.min(cellWidth, cellHeight);
  [cellWidth, cellHeight] = [Math.min(cellWidth, LARGEST_CELL), Math.min(cellHeight, LARGEST_CELL)];
  place = {
    left, below, top: 8, width: cellWidth * one.columns, height: cellHeight * one.rows,
    cellWidth: cellWidth * zoom.factor, cellHeight: cellHeight * zoom.factor,
    rows: one.rows, columns: one.columns,
  };
  keepInside(zoom);
}

// Clamp the first row and column in view, so that the view contains only cells.
function keepInside(zoom) {
  const inside = (start, count, shownCount) => Math.max(0, Math.min(start, count - shownCount));
  zoom.column = inside(zoom.column, place.columns, place.columns / zoom.factor);
  zoom.row = inside(zoom.row, place.rows, place.rows / zoom.factor);
}

function cellAt(x, y, zoom) {
  if (!place || x < place.left || y < place.top) return null;
  if (x >= place.left + place.width || y >= place.top + place.height) return null;
  const column = Math.floor((x - place.left) / place.cellWidth + zoom.column);
  const row = Math.floor((y - place.top) / place.cellHeight + zoom.row);
  return row < place.rows && column < place.columns ? { row, column } : null;
}

function cellLeft(column, zoom) {
  return place.left + (column - zoom.column) * place.cellWidth;
}

function cellTop(row, zoom) {
  return place.top + (row - zoom.row) * place.cellHeight;
}

// The largest size of a number, 1 if there is none.
function largestOf(values, signed) {
  let top = 0;
  for (let i = 0; i < values.length; i++) {
    const size = sizeOf(values[i], signed);
    if (size > top && size < Infinity) top = size;
  }
  return top || 1;
}

// The values as an image of columns x rows pixels. A pixel of several cells shows the largest of them.
function imageOf(one, values, top, scale, columns, rows) {
  let pooled = values;
  if (columns < one.columns || rows < one.rows) {
    pooled = new Float32Array(rows * columns);
    for (let r = 0, i = 0; r < one.rows; r++) {
      const start = Math.floor((r * rows) / one.rows) * columns;
      for (let c = 0; c < one.columns; c++, i++) {
        const to = start + Math.floor((c * columns) / one.columns);
        if (sizeOf(values[i], one.signed) > sizeOf(pooled[to], one.signed)) pooled[to] = values[i];
      }
    }
  }
  const image = new ImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  const zero = pixel(themeColour("zero"));
  const colours = PIXELS[Number(one.signed)];
  for (let i = 0; i < pooled.length; i++) {
    const isSeen = sizeOf(pooled[i], one.signed) > 0;
    pixels[i] = isSeen ? colours[colourIndex(onScale(pooled[i], top, scale, one.signed))] : zero;
  }
  return image;
}

// Paint the whole map, one pixel per cell. Where cells are smaller than a screen pixel, a pixel shows the largest of its cells.
function paint(one, kind, scale, key) {
  const density = window.devicePixelRatio || 1;
  const columns = Math.min(one.columns, Math.max(1, Math.floor(place.cellWidth * one.columns * density)));
  const rows = Math.min(one.rows, Math.max(1, Math.floor(place.cellHeight * one.rows * density)));
  const whole = `${key} ${columns} ${rows}`;
  if (painted.key === whole) return;
  const values = valuesOf(one, kind);
  painted.top = largestOf(values, one.signed);
  const image = imageOf(one, values, painted.top, scale, columns, rows);
  painted.canvas.width = columns;
  painted.canvas.height = rows;
  painted.canvas.getContext("2d").putImageData(image, 0, 0);
  painted.key = whole;
}

function drawCells(one, sequence, kind, scale, zoom, key) {
  // Set before the layout: the text above the map decides how much height is left.
  const meaning = meaningOf(kind, one.signed);
  document.getElementById("meaning").textContent = meaning + (SCALES[scale] ? ` (${SCALES[scale]})` : "");
  layOut(one, sequence, zoom);
  paint(one, kind, scale, key);
  const width = place.left + place.width + 2;
  const context = sized(cellsCanvas, width, place.top + place.height + place.below);
  frameElement.style.width = `${width}px`;
  frameElement.classList.toggle("zoomed", zoom.factor > 1);
  Object.assign(frameElement.dataset, {
    left: place.left, top: place.top, cellWidth: place.cellWidth, cellHeight: place.cellHeight,
  });
  const [across, down] = [painted.canvas.width / one.columns, painted.canvas.height / one.rows];
  context.imageSmoothingEnabled = false;
  context.drawImage(
    painted.canvas, zoom.column * across, zoom.row * down,
    (one.columns / zoom.factor) * across, (one.rows / zoom.factor) * down,
    place.left, place.top, place.width, place.height,
  );
  context.save();
  context.beginPath();
  context.rect(place.left, place.top, place.width, place.height);
  context.clip();
  const view = inView(zoom);
  if (Math.min(place.cellWidth, place.cellHeight) >= 14) drawGaps(context, view, zoom);
  if (place.cellWidth >= 40 && place.cellHeight >= 18) writeNumbers(context, one, kind, scale, view, zoom);
  context.restore();
  drawLabels(context, sequence, view, zoom);
}

// The rows and columns that are at least partly in view.
function inView(zoom) {
  return {
    rows: [Math.floor(zoom.row), Math.min(place.rows, Math.ceil(zoom.row + place.rows / zoom.factor - 1e-9))],
    columns: [Math.floor(zoom.column), Math.min(place.columns, Math.ceil(zoom.column + place.columns / zoom.factor - 1e-9))],
  };
}

function drawGaps(context, { rows, columns }, zoom) {
  context.fillStyle = themeColour("gap");
  for (let r = rows[0] + 1; r < rows[1]; r++) context.fillRect(place.left, cellTop(r, zoom) - 0.5, place.width, 1);
  for (let c = columns[0] + 1; c < columns[1]; c++) context.fillRect(cellLeft(c, zoom) - 0.5, place.top, 1, place.height);
}

function writeNumbers(context, one, kind, scale, { rows, columns }, zoom) {
  context.font = font(12);
  context.textAlign = "center";
  context.textBaseline = "middle";
  for (let r = rows[0]; r < rows[1]; r++) {
    for (let c = columns[0]; c < columns[1]; c++) {
      const value = valueAt(one, kind, r, c);
      const size = sizeOf(value, one.signed);
      if (!(size > 0)) continue;
      const part = onScale(value, painted.top, scale, one.signed);
      const isLight = one.signed ? Math.abs(part - 0.5) < 0.3 : part > 0.55;
      context.fillStyle = isLight ? "#000" : "#fff";
      const text = size >= 0.01 && size < 100 ? value.toPrecision(2) : value.toExponential(0);
      context.fillText(text, cellLeft(c + 0.5, zoom), cellTop(r + 0.5, zoom));
    }
  }
}

function drawLabels(context, sequence, { rows, columns }, zoom) {
  context.font = font(12);
  context.fillStyle = themeColour("text");
  context.textBaseline = "middle";
  context.textAlign = "right";
  const rowStep = labelStep(place.cellHeight, 16);
  for (let r = Math.ceil(rows[0] / rowStep) * rowStep; r < rows[1]; r += rowStep) {
    const y = cellTop(r + 0.5, zoom);
    if (y < place.top || y > place.top + place.height) continue;
    context.fillText(fitted(context, sequence.query.labels[r], place.left - 15), place.left - 12, y);
  }
  const labels = sequence.key.labels;
  const bottom = place.top + place.height + 7;
  let flat = true;
  for (let c = columns[0]; c < columns[1] && flat; c++) {
    flat = context.measureText(oneLine(labels[c].slice(0, 60))).width <= place.cellWidth - 8;
  }
  const columnStep = flat ? 1 : labelStep(place.cellWidth, 16);
  for (let c = Math.ceil(columns[0] / columnStep) * columnStep; c < columns[1]; c += columnStep) {
    const x = cellLeft(c + 0.5, zoom);
    if (x < place.left || x > place.left + place.width) continue;
    context.save();
    context.translate(x, bottom);
    if (flat) {
      context.textAlign = "center";
      context.textBaseline = "top";
    } else {
      context.rotate(-Math.PI / 2);
    }
    context.fillText(fitted(context, labels[c], flat ? place.cellWidth : place.below - 10), 0, 0);
    context.restore();
  }
}

// Mark the selected row, the selected cell, and the cell under the pointer.
function drawMarks(zoom, { row, cursor, hover }) {
  const context = sized(marksCanvas, place.left + place.width + 2, place.top + place.height + place.below);
  if (row !== null) {
    const y = cellTop(row, zoom);
    outline(context, place.left, y, place.width, place.cellHeight, 2);
    if (y + place.cellHeight > place.top && y < place.top + place.height) {
      // An arrow too, because one row of 500 is hardly a pixel high.
      const middle = Math.min(place.top + place.height - 3, Math.max(place.top + 3, y + place.cellHeight / 2));
      context.fillStyle = themeColour("mark");
      context.beginPath();
      context.moveTo(place.left - 1, middle);
      context.lineTo(place.left - 8, middle - 6);
      context.lineTo(place.left - 8, middle + 6);
      context.fill();
    }
  }
  for (const [cell, thickness] of [[hover, 1], [cursor, 2]]) {
    if (!cell) continue;
    const size = (length) => Math.max(length, 7);
    const [width, height] = [size(place.cellWidth), size(place.cellHeight)];
    const x = cellLeft(cell.column + 0.5, zoom) - width / 2;
    const y = cellTop(cell.row + 0.5, zoom) - height / 2;
    outline(context, x, y, width, height, thickness);
  }
}

function outline(context, x, y, width, height, thickness) {
  context.save();
  context.beginPath();
  context.rect(place.left - 4, place.top - 4, place.width + 8, place.height + 8);
  context.clip();
  context.lineWidth = thickness + 2;
  context.strokeStyle = themeColour("halo");
  context.strokeRect(x, y, width, height);
  context.lineWidth = thickness;
  context.strokeStyle = themeColour("mark");
  context.strokeRect(x, y, width, height);
  context.restore();
}

// Draw the colour bar with its numbers.
function drawLegend(scale, signed) {
  const bar = document.getElementById("bar");
  const width = bar.parentElement.clientWidth;
  const context = sized(bar, width, 14);
  bar.style.width = "";
  for (let i = 0; i < 256; i++) {
    context.fillStyle = coloursOf(signed)[i];
    context.fillRect((i * width) / 256, 0, width / 256 + 1, 14);
  }
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((part) => {
    const tick = document.createElement("span");
    const below = part === 0 && scale === "log" && !signed ? "\u2264 " : "";
    const value = valueOnScale(part, painted.top, scale, signed);
    tick.textContent = below + (signed && value > 0 ? "+" : "") + compact(value);
    tick.style.left = `${100 * part}%`;
    return tick;
  });
  document.getElementById("ticks").replaceChildren(...ticks);
}
