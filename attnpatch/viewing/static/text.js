// The text of the conversation. Each block takes the selected row's colour by how much the row attends to it.

const textBox = document.getElementById("text");
const MOST_BLOCKS = 4000; // listed
const MOST_OF_A_TEXT = 4000; // characters
const FLOWING = 16; // blocks whose texts are on average this short (words, tokens) flow like a text
const STRONGEST_TINT = 55; // percent
let written = null; // the sequence whose text is there

const textsOf = (side) => side.texts ?? side.labels;

// Build the elements of a sequence's text, once.
function writeText(sequence) {
  if (written === sequence) return;
  written = sequence;
  const { key } = sequence;
  const texts = textsOf(key).slice(0, MOST_BLOCKS);
  const letters = texts.reduce((sum, text) => sum + Math.min(text.length, 999), 0);
  const flows = letters <= FLOWING * texts.length;
  textBox.classList.toggle("flowing", flows);
  const items = texts.map((text, column) => {
    const item = make(flows ? "span" : "div", "block");
    item.setAttribute("role", "option");
    item.tabIndex = -1;
    item.dataset.column = column;
    if (flows) item.textContent = text;
    else item.append(make("b", "", oneLine(key.labels[column])), " ", make("span", "number"), make("div", "words", shortened(key.texts ? text : "", MOST_OF_A_TEXT)));
    return item;
  });
  textBox.replaceChildren(...items);
  const left = textsOf(key).length - texts.length;
  document.getElementById("text-note").textContent = left ? `${left} more blocks are not listed here.` : "";
}

// Colour the blocks by the numbers of the selected row.
function colourText(one, sequence, { row, cursor, normalization }) {
  writeText(sequence);
  const values = Array.from(textBox.children, (_, column) => (row === null ? 0 : valueAt(one, normalization, row, column)));
  const most = values.reduce((top, value) => Math.max(top, Number.isFinite(value) ? sizeOf(value, one.signed) : 0), 0) || 1;
  const own = row === null ? -1 : columnOfRow(sequence, row);
  const flows = textBox.classList.contains("flowing");
  values.forEach((value, column) => {
    const item = textBox.children[column];
    const part = Math.sqrt(Math.max(0, Math.min(1, sizeOf(value, one.signed) / most))) || 0;
    const colour = one.signed ? (value < 0 ? "down" : "up") : "accent";
    item.style.backgroundColor = part ? `color-mix(in srgb, var(--${colour}) ${(STRONGEST_TINT * part).toFixed(1)}%, transparent)` : "";
    item.setAttribute("aria-selected", String(column === own));
    const number = row === null ? "" : shown(value);
    if (flows) item.title = number;
    else item.querySelector(".number").textContent = number;
  });
  const focused = textBox.contains(document.activeElement) ? document.activeElement : null;
  const first = focused ?? textBox.children[own] ?? textBox.children[0];
  textBox.querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
  if (first) first.tabIndex = 0;
  const title = row === null ? "The text" : `The text, coloured by what ${shortened(oneLine(sequence.query.labels[row]), 40)} attends to`;
  document.getElementById("text-title").textContent = title;
  if (cursor && !focused && !textBox.matches(":hover")) showInBox(textBox.children[cursor.column]);
}

// Scroll the box, and only the box.
function showInBox(item) {
  if (!item) return;
  const [inside, box] = [item.getBoundingClientRect(), textBox.getBoundingClientRect()];
  if (inside.top < box.top || inside.bottom > box.bottom) textBox.scrollTop += inside.top - box.top - 40;
}

// The key block that is the same block as a query block, and the other way round; -1 if there is none.
// If the map does not say it, blocks with one label are the same.
const isSaid = ({ own }) => own.some((column) => column !== null);
const columnOfRow = (sequence, row) => {
  return isSaid(sequence) ? sequence.own[row] ?? -1 : sameBlock(sequence.query.labels, sequence.key.labels, row);
};
const rowOfColumn = (sequence, column) => {
  return isSaid(sequence) ? sequence.own.indexOf(column) : sameBlock(sequence.key.labels, sequence.query.labels, column);
};

// The block of another map that bears the same label; -1 if there is none.
function sameBlock(from, to, index) {
  return from[index] === to[index] ? index : to.indexOf(from[index]);
}

// Select the row of a block, and in it the block to which it attends most.
function chooseBlock(column) {
  const row = rowOfColumn(theSequence(), column);
  if (row < 0) return select({ row: state.row ?? current.rows - 1, column }, state.row ?? current.rows - 1);
  select({ row, column: strongestOf(current, state.normalization, row)?.column ?? column }, row);
}

const blockOf = (event) => event.target.closest?.(".block");

textBox.addEventListener("click", (event) => {
  const item = blockOf(event);
  // A drag marks text to copy; it chooses nothing.
  if (!item || !current || String(getSelection())) return;
  item.focus({ preventScroll: true });
  chooseBlock(Number(item.dataset.column));
});

const TEXT_MOVES = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1 };

textBox.addEventListener("keydown", (event) => {
  const item = blockOf(event);
  if (!item || !current || event.ctrlKey || event.metaKey || event.altKey) return;
  const items = textBox.children;
  const at = Number(item.dataset.column);
  let next = null;
  if (event.key in TEXT_MOVES) next = items[at + TEXT_MOVES[event.key]];
  else if (event.key === "Home") next = items[0];
  else if (event.key === "End") next = items[items.length - 1];
  else if (event.key === "Enter" || event.key === " ") chooseBlock(at);
  else return;
  event.preventDefault();
  if (!next) return;
  item.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
