// Viridis: even steps of lightness, so the order is visible to colour-blind readers and in grey; 256 colours, six digits each.
const VIRIDIS =
  "44015444025544035745055845065a45085b46095c460b5e460c5f460e61470f62471163471265471466471567471669" +
  "47186a48196b481a6c481c6e481d6f481e70482071482172482273482374472575472676472777472878472a79472b7a" +
  "472c7b462d7c462f7c46307d46317e45327f45347f453580453681443781443982433a83433b83433c84423d84423e85" +
  "4240854141864142864043874044873f45873f47883e48883e49893d4a893d4b893d4c893c4d8a3c4e8a3b508a3b518a" +
  "3a528b3a538b39548b39558b38568b38578c37588c37598c365a8c365b8c355c8c355d8c345e8d345f8d33608d33618d" +
  "32628d32638d31648d31658d31668d30678d30688d2f698d2f6a8d2e6b8e2e6c8e2e6d8e2d6e8e2d6f8e2c708e2c718e" +
  "2c728e2b738e2b748e2a758e2a768e2a778e29788e29798e287a8e287a8e287b8e277c8e277d8e277e8e267f8e26808e" +
  "26818e25828e25838d24848d24858d24868d23878d23888d23898d22898d228a8d228b8d218c8d218d8c218e8c208f8c" +
  "20908c20918c1f928c1f938b1f948b1f958b1f968b1e978a1e988a1e998a1e998a1e9a891e9b891e9c891e9d881e9e88" +
  "1e9f881ea0871fa1871fa2861fa38620a48520a58521a68521a78422a78423a88323a98224aa8225ab8126ac8127ad80" +
  "28ae7f29af7f2ab07e2bb17d2cb17d2eb27c2fb37b30b47a32b57a33b67935b77836b87738b97639b9763bba753dbb74" +
  "3ebc7340bd7242be7144be7045bf6f47c06e49c16d4bc26c4dc26b4fc36951c46853c56755c66657c66559c7645bc862" +
  "5ec96160c96062ca5f64cb5d67cc5c69cc5b6bcd596dce5870ce5672cf5574d05477d05279d1517cd24f7ed24e81d34c" +
  "83d34b86d44988d5478bd5468dd64490d64392d74195d73f97d83e9ad83c9dd93a9fd938a2da37a5da35a7db33aadb32" +
  "addc30afdc2eb2dd2cb5dd2bb7dd29bade27bdde26bfdf24c2df22c5df21c7e01fcae01ecde01dcfe11cd2e11bd4e11a" +
  "d7e219dae218dce218dfe318e1e318e4e318e7e419e9e419ece41aeee51bf1e51cf3e51ef6e61ff8e621fae622fde724";

// For signed numbers: purple below 0, orange above, white at 0. Lightness shows the size.
const SIDES = ["2d004b", "542788", "8073ac", "b2abd2", "d8daeb", "f7f7f7", "fee0b6", "fdb863", "e08214", "b35806", "7f3b08"];

// 256 colours for unsigned numbers, and 256 for signed ones.
const COLOURS = [
  Array.from({ length: 256 }, (_, i) => "#" + VIRIDIS.slice(6 * i, 6 * i + 6)),
  Array.from({ length: 256 }, (_, i) => between(SIDES, i / 255)),
];
const coloursOf = (signed) => COLOURS[Number(signed)];

function between(colours, part) {
  const at = Math.min(colours.length - 2, Math.floor(part * (colours.length - 1)));
  const weight = part * (colours.length - 1) - at;
  const parts = [0, 2, 4].map((byte) => {
    const [low, high] = [at, at + 1].map((i) => parseInt(colours[i].slice(byte, byte + 2), 16));
    return Math.round(low + weight * (high - low)).toString(16).padStart(2, "0");
  });
  return "#" + parts.join("");
}

// As canvas pixels: red, green, blue, opaque, lowest byte first.
const PIXELS = COLOURS.map((colours) => Uint32Array.from(colours, pixel));

function pixel(colour) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

const DECADES = 4; // range of the logarithmic scale, below the largest value

// The position of a value on the colour bar, 0 to 1; for signed numbers, 0 is in the middle.
function onScale(value, top, scale, signed) {
  if (signed) return 0.5 + (Math.sign(value) * onScale(Math.abs(value), top, scale, false)) / 2;
  const part = Math.min(1, Math.max(0, value / top));
  if (scale === "log") return part > 0 ? Math.max(0, 1 + Math.log10(part) / DECADES) : 0;
  return scale === "sqrt" ? Math.sqrt(part) : part;
}

function valueOnScale(part, top, scale, signed) {
  if (signed) return Math.sign(part - 0.5) * valueOnScale(Math.abs(2 * part - 1), top, scale, false);
  if (scale === "log") return top * 10 ** (DECADES * (part - 1));
  return top * (scale === "sqrt" ? part * part : part);
}

const SCALES = { sqrt: "square-root scale", linear: "", log: "logarithmic scale" };

const colourIndex = (part) => Math.min(255, Math.floor(part * 256));

function themeColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function isDark() {
  return document.documentElement.dataset.theme === "dark";
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  const button = document.getElementById("theme");
  button.textContent = theme === "dark" ? "Light" : "Dark";
  button.setAttribute("aria-label", `Switch to the ${theme === "dark" ? "light" : "dark"} theme`);
}
