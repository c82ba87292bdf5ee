"use strict";

// The page's data: facts as JSON, and one deflated piece of numbers per sequence, step, layer and head.

const maps = JSON.parse(document.getElementById("data").textContent);

// Inflated numbers are cached, up to this many bytes.
const MOST_BYTES = 300e6;
const held = new Map();
let heldBytes = 0;

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function inflated(bytes) {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("This browser is too old for this page: it lacks DecompressionStream (2023 or later).");
  }
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The upper 24 bits of float32: all first bytes, all second bytes, all third bytes.
function unpacked(bytes) {
  const count = bytes.length / 3;
  const bits = new Uint32Array(count);
  for (let i = 0; i < count; i++) {
    bits[i] = (bytes[i] << 24) | (bytes[i + count] << 16) | (bytes[i + 2 * count] << 8);
  }
  return new Float32Array(bits.buffer);
}

const planeId = (at) => `n${at.map}-${at.sequence}-${at.step}-${at.layer}-${at.head}`;

// The numbers of one picture: {id, rows, columns, mass, signed, keySizes, sums}. Inflated once, then cached.
function plane(at) {
  const id = planeId(at);
  const entry = held.get(id) ?? readPlane(id, maps[at.map].sequences[at.sequence], maps[at.map].signed);
  held.delete(id);
  held.set(id, entry); // most recently used last
  for (const [old, { bytes }] of held) {
    if (heldBytes <= MOST_BYTES || old === id) break;
    held.delete(old);
    heldBytes -= bytes;
  }
  return entry.promise;
}

function readPlane(id, { query, key }, signed) {
  const [rows, columns] = [query.labels.length, key.labels.length];
  const bytes = 4 * rows * columns;
  heldBytes += bytes;
  const packed = bytesOf(document.getElementById(id).textContent);
  const promise = inflated(packed).then((raw) => {
    return { id, rows, columns, mass: unpacked(raw), signed, keySizes: key.sizes, sums: {} };
  });
  return { bytes, promise };
}

// The size of a number, for sums. Signed numbers (gradients) are summed as absolute values, because plain sums may be near 0.
const sizeOf = (value, signed) => (signed ? Math.abs(value) : value);

// The divisors of the mass: {by: "row" or "column" or null, values}.
function divisor(one, kind) {
  if (kind === "none") return { by: null };
  if (kind === "density") return { by: "column", values: one.keySizes.map((size) => Math.max(size, 1)) };
  if (!one.sums[kind]) {
    const values = new Float64Array(kind === "row" ? one.rows : one.columns);
    for (let r = 0, i = 0; r < one.rows; r++) {
      for (let c = 0; c < one.columns; c++, i++) values[kind === "row" ? r : c] += sizeOf(one.mass[i], one.signed);
    }
    one.sums[kind] = values;
  }
  return { by: kind, values: one.sums[kind] };
}

function divided(mass, by) {
  return by === 0 ? 0 : mass / by;
}

function valueAt(one, kind, row, column) {
  const mass = one.mass[row * one.columns + column];
  const { by, values } = divisor(one, kind);
  return by ? divided(mass, values[by === "row" ? row : column]) : mass;
}

// All values of a picture, row by row.
function valuesOf(one, kind) {
  if (kind === "none") return one.mass;
  const { by, values } = divisor(one, kind);
  const result = new Float32Array(one.mass.length);
  for (let r = 0, i = 0; r < one.rows; r++) {
    for (let c = 0; c < one.columns; c++, i++) result[i] = divided(one.mass[i], values[by === "row" ? r : c]);
  }
  return result;
}

const MEANING = {
  none: "attention mass, mean over the row's tokens",
  row: "share of the row's attention mass",
  density: "attention mass per key token",
  column: "share of the mass the column receives",
};

const SIGNED_MEANING = {
  none: "probability \u00d7 gradient, mean over the row's tokens",
  row: "probability \u00d7 gradient, share of the row's absolute sum",
  density: "probability \u00d7 gradient per key token",
  column: "probability \u00d7 gradient, share of the column's absolute sum",
};

// Numbers with signs that are no gradients are differences, or weights that were mixed after softmax.
function weightNamed(text) {
  const { gradient, numbers } = theMap();
  if (numbers) return text.replace(/probability \u00d7 gradient(, mean over the row's tokens)?/, () => numbers);
  return gradient ? text : text.replace("probability \u00d7 gradient", "weight after mixing");
}
const meaningOf = (kind, signed) => (signed || theMap().numbers ? weightNamed(SIGNED_MEANING[kind]) : MEANING[kind]);

// Three significant digits.
function shown(value) {
  if (!Number.isFinite(value)) return "no number";
  if (value === 0) return "0";
  return Math.abs(value) >= 0.001 && Math.abs(value) < 1000 ? value.toPrecision(3) : value.toExponential(2);
}

// At most three significant digits.
function compact(value) {
  return value === 0 || Math.abs(value) >= 1e-4 ? String(Number(value.toPrecision(3))) : value.toExponential(0);
}

function shortened(text, longest) {
  const letters = Array.from(text.slice(0, 2 * longest + 2));
  return letters.length > longest ? letters.slice(0, longest - 1).join("").trimEnd() + "\u2026" : text;
}

const oneLine = (text) => text.replace(/\s+/g, " ").trim();
