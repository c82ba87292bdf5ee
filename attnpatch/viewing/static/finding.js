// The finding: what the last query row attends to most, and in which layer. The page opens on it.

// A block in a few words: its label, and its text unless the label says it already.
function inWords(side, index, longest) {
  const [label, text] = [oneLine(side.labels[index]), oneLine((side.texts?.[index] ?? "").slice(0, 400))];
  if (!text || text === label) return shortened(label, longest);
  return shortened(label ? `${label}: ${text}` : text, longest);
}

const OTHERS_FROM = 0.25; // a second block is named if it gets at least this part of what the first one gets

// The finding as a sentence; its blocks are buttons that lead to their cells.
function fillFinding(map, sequence, isShown, go) {
  const line = document.getElementById("finding");
  const { found } = sequence;
  line.hidden = !found || !isShown;
  if (line.hidden) return;
  const most = Math.abs(found.cells[0][2]);
  const told = found.cells.slice(0, 2).filter(([, , value]) => Math.abs(value) >= OTHERS_FROM * most);
  const isOfMass = !map.signed && !map.numbers;
  const parts = [make("b", "", shortened(oneLine(sequence.query.labels[found.row]), 60))];
  parts.push(isOfMass ? " attends most to " : `: the largest number (${numberName(map)}) is at `);
  told.forEach(([layer, column, value], place) => {
    if (place) parts.push(", then ");
    const button = make("button", "link", `\u201c${inWords(sequence.key, column, 64)}\u201d`);
    button.type = "button";
    button.addEventListener("click", () => go(found.row, column, layer));
    parts.push(button, ` (${shown(value)}${map.layers.length > 1 ? `, layer ${map.layers[layer]}` : ""})`);
  });
  line.replaceChildren(...parts, ".");
}

const numberName = (map) => map.numbers ?? (map.gradient ? "probability \u00d7 gradient" : "weight after mixing");
