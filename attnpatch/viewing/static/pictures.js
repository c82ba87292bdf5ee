// The pictures: each grid of tiles among the key blocks, over its picture, in the colours of the selected row.

const pictureBox = document.getElementById("pictures");
const picturePanel = document.getElementById("picture-panel");
const heatChoice = document.getElementById("heat");
const MOST_GRIDS = 64; // such as frames of a video
const GRID_PIXELS = 640; // longer side of a canvas
let picturesOf = null; // the sequence whose grids are there
const decoded = new Map();

// The picture of a grid as an ImageBitmap; decoded once.
function decodedPicture({ id }) {
  if (!decoded.has(id)) {
    const bytes = bytesOf(document.getElementById(id).textContent);
    decoded.set(id, createImageBitmap(new Blob([bytes], { type: "image/jpeg" })));
  }
  return decoded.get(id);
}

// The edges of rows or columns of tiles, as parts of the whole.
function edgesOf(sizes) {
  const total = sizes.reduce((sum, size) => sum + size, 0);
  let sum = 0;
  return [0, ...sizes.map((size) => (sum += size) / total)];
}

// Build the figures of a sequence, once.
function writePictures(sequence) {
  if (picturesOf === sequence) return;
  picturesOf = sequence;
  const figures = sequence.grids.slice(0, MOST_GRIDS).map((grid, index) => {
    const figure = make("figure");
    const canvas = make("canvas");
    const [height, width] = [grid.heights, grid.widths].map((sizes) => sizes.reduce((sum, size) => sum + size, 0));
    const shape = grid.picture ?? { width, height };
    const times = GRID_PIXELS / Math.max(shape.width, shape.height);
    [canvas.width, canvas.height] = [shape.width, shape.height].map((side) => Math.max(1, Math.round(side * times)));
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.dataset.grid = index;
    const about = make("figcaption");
    about.id = `grid-${index}`;
    canvas.setAttribute("aria-describedby", about.id);
    figure.append(canvas, about);
    return figure;
  });
  pictureBox.replaceChildren(...figures);
  const left = sequence.grids.length - figures.length;
  document.getElementById("picture-note").textContent = left ? `${left} more pictures are not shown.` : "";
}

// The number that colours a tile: per token, because tiles at the edges may have fewer.
function perToken(one, kind, row, column) {
  const value = valueAt(one, kind, row, column);
  return kind === "none" || kind === "row" ? value / Math.max(1, one.keySizes[column]) : value;
}

let picturing = 0;

async function drawPictures(one, sequence, { row, cursor, normalization }) {
  picturePanel.hidden = !sequence.grids.length;
  if (picturePanel.hidden) return;
  const mine = ++picturing;
  writePictures(sequence);
  const who = row === null ? "" : shortened(oneLine(sequence.query.labels[row]), 40);
  document.getElementById("picture-title").textContent = who ? `Where ${who} looks` : "The pictures";
  const shownGrids = sequence.grids.slice(0, MOST_GRIDS);
  const values = shownGrids.map((grid) => {
    return grid.blocks.map((line) => line.map((column) => (row === null ? 0 : perToken(one, normalization, row, column))));
  });
  // One scale for all pictures, so that they can be compared.
  const top = largestOf(values.flat(2), one.signed);
  const bitmaps = await Promise.all(shownGrids.map((grid) => grid.picture && decodedPicture(grid.picture)));
  if (mine !== picturing) return;
  shownGrids.forEach((grid, index) => {
    const [canvas, about] = pictureBox.children[index].children;
    drawGrid(canvas, grid, bitmaps[index], values[index], { top, signed: one.signed });
    if (cursor) markTile(canvas, grid, cursor.column);
    const said = row === null ? "" : inPicture(one, sequence, grid, row, normalization);
    const name = grid.name[0].toUpperCase() + grid.name.slice(1);
    about.replaceChildren(make("b", "", name), said ? `: ${said}` : "");
    canvas.setAttribute("aria-label", `${name}, ${grid.blocks.length} rows of ${grid.blocks[0].length} tiles. Arrow keys move to another tile.`);
  });
}

// What a row sees of a picture, in words: the sum, and the strongest tile.
function inPicture(one, sequence, grid, row, kind) {
  const columns = grid.blocks.flat();
  const size = (column) => sizeOf(perToken(one, kind, row, column), one.signed) || 0;
  const best = columns.reduce((most, column) => (size(column) > size(most) ? column : most));
  const sum = columns.reduce((total, column) => total + valueAt(one, kind, row, column), 0);
  const place = oneLine(sequence.key.labels[best]).split(" ").pop();
  const strongest = size(best) > 0 ? `most at ${place} (${shown(valueAt(one, kind, row, best))})` : "nothing";
  return kind === "none" || kind === "row" ? `${shown(sum)} in all, ${strongest}` : strongest;
}

function drawGrid(canvas, grid, bitmap, values, { top, signed }) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  context.globalAlpha = 1;
  context.fillStyle = themeColour("zero");
  context.fillRect(0, 0, width, height);
  if (bitmap) context.drawImage(bitmap, 0, 0, width, height);
  if (!heatChoice.checked) return;
  if (bitmap) {
    // In grey, so that colours are numbers.
    context.globalCompositeOperation = "saturation";
    context.fillStyle = "#808080";
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "source-over";
  }
  const [across, down] = [edgesOf(grid.widths), edgesOf(grid.heights)];
  values.forEach((line, r) => line.forEach((value, c) => {
    const size = sizeOf(value, signed);
    if (!(size > 0)) return;
    const part = onScale(value, top, state.scale, signed);
    const strength = signed ? Math.abs(2 * part - 1) : part;
    // What gets little lets the picture through.
    context.globalAlpha = bitmap ? 0.12 + 0.63 * strength : 1;
    context.fillStyle = coloursOf(signed)[colourIndex(part)];
    const [x, y] = [Math.round(across[c] * width), Math.round(down[r] * height)];
    context.fillRect(x, y, Math.round(across[c + 1] * width) - x, Math.round(down[r + 1] * height) - y);
  }));
  context.globalAlpha = 1;
}

// Row and column of a block in a grid; null if it is none of its tiles.
function tileOf(grid, column) {
  const row = grid.blocks.findIndex((line) => line.includes(column));
  return row < 0 ? null : [row, grid.blocks[row].indexOf(column)];
}

function markTile(canvas, grid, column) {
  const tile = tileOf(grid, column);
  if (!tile) return;
  const [across, down] = [edgesOf(grid.widths), edgesOf(grid.heights)];
  const [r, c] = tile;
  const box = [across[c] * canvas.width, down[r] * canvas.height];
  const size = [(across[c + 1] - across[c]) * canvas.width, (down[r + 1] - down[r]) * canvas.height];
  const context = canvas.getContext("2d");
  for (const [colour, thickness] of [["halo", 8], ["mark", 4]]) {
    context.strokeStyle = themeColour(colour);
    context.lineWidth = thickness;
    context.strokeRect(...box, ...size);
  }
}

// ---- pointer and keys

const gridOf = (event) => theSequence().grids[Number(event.target.dataset?.grid ?? -1)];

function blockUnder(event) {
  const grid = gridOf(event);
  if (!grid) return -1;
  const { left, top, width, height } = event.target.getBoundingClientRect();
  const place = (part, sizes) => Math.min(sizes.length - 1, edgesOf(sizes).findLastIndex((edge) => edge <= part));
  const [c, r] = [place((event.clientX - left) / width, grid.widths), place((event.clientY - top) / height, grid.heights)];
  return grid.blocks[r]?.[c] ?? -1;
}

const rowShown = () => state.row ?? current.rows - 1;

pictureBox.addEventListener("pointermove", (event) => {
  const column = event.pointerType === "touch" || !current ? -1 : blockUnder(event);
  if (column < 0) return hideTooltip();
  const cell = { row: rowShown(), column };
  showTooltip(event.clientX, event.clientY, aboutCell(valueAt(current, state.normalization, cell.row, column), state.normalization, theSequence(), cell));
});
pictureBox.addEventListener("pointerleave", hideTooltip);

pictureBox.addEventListener("click", (event) => {
  const column = current ? blockUnder(event) : -1;
  if (column >= 0) select({ row: rowShown(), column }, rowShown());
});

pictureBox.addEventListener("keydown", (event) => {
  const grid = gridOf(event);
  if (!grid || !(event.key in MOVES) || !current || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const [down, right] = MOVES[event.key];
  const at = state.cursor && tileOf(grid, state.cursor.column);
  const inside = (position, count) => Math.max(0, Math.min(count - 1, position));
  const [r, c] = at ? [inside(at[0] + down, grid.heights.length), inside(at[1] + right, grid.widths.length)] : [0, 0];
  select({ row: rowShown(), column: grid.blocks[r][c] }, rowShown());
});

heatChoice.addEventListener("change", () => current && drawPictures(current, theSequence(), state));
