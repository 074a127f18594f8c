// A picture, the model's answers and their maps. The program does all that the model and the method compute.
// This file prepares the picture as the model wants it, and draws the map as libragrad_fx.viz does.

const by = (id) => document.getElementById(id);
const data = JSON.parse(by("data").textContent);
const [HEIGHT, WIDTH] = data.pixels.size;
const LEAST = 448; // screen pixels of a side: a smaller picture is drawn with larger pixels
const CLASSES = 5;

// --- numbers and names, as captions of libragrad_fx write them

const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
const short = (value, digits) => String(Number(value.toPrecision(digits)));
function number(value) {
  const size = Math.abs(value);
  if (value === 0 || size >= 0.1) return size < 10 ? value.toFixed(2) : short(value, 3);
  if (size >= 1e-3) return short(value, 2);
  const [mantissa, exponent] = value.toExponential(1).split("e");
  return `${mantissa}·10${[...String(Number(exponent))].map((c) => SUPERSCRIPTS[c]).join("")}`;
}
const percent = (p) => (p < 1e-3 ? "< 0.1" : p > 0.995 ? "> 99" : (100 * p).toPrecision(2)) + "\u00a0%";
const named = (index) => (data.labels[index] ?? "").split(",")[0] || `class ${index}`;

// --- resizing, as Pillow does it. A raster is { levels, width, height, channels }, channels side by side

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
const FILTERS = {
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, (x) => ((x = Math.abs(x)), x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0)],
  lanczos: [3, (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

// of each new pixel: the first old one that it is made of, and their weights
function weights(length, size, [low, high], filter) {
  const step = (high - low) / size;
  const stretch = Math.max(step, 1);
  const [support, of] = FILTERS[filter];
  return Array.from({ length: size }, (_, i) => {
    const centre = low + (i + 0.5) * step;
    const first = Math.max(0, Math.trunc(centre - support * stretch + 0.5));
    const last = Math.min(length, Math.trunc(centre + support * stretch + 0.5));
    const found = Array.from({ length: last - first }, (_, k) => of((k + first - centre + 0.5) / stretch));
    const sum = found.reduce((a, b) => a + b, 0);
    return { first, found: found.map((w) => w / sum) };
  });
}

// levels: whole numbers from 0 to 255, with weights of 22 bits; other numbers are floats
function resized(old, width, height, filter, box = [0, 0, old.width, old.height], levels = true) {
  const across = pass(old, width, 1, [box[0], box[2]], filter, levels);
  return pass(across, height, across.width, [box[1], box[3]], filter, levels);
}

function pass(old, size, step, [low, high], filter, levels) {
  const wide = step === 1;
  const [length, channels] = [wide ? old.width : old.height, old.channels];
  if (size === length && low === 0 && high === length) return old;
  const [width, height] = wide ? [size, old.height] : [old.width, size];
  const made = levels ? new Uint8ClampedArray(width * height * channels) : new Float32Array(width * height * channels);
  const [UNIT, jump, row] = [2 ** 22, step * channels, old.width * channels];
  weights(length, size, [low, high], filter).forEach(({ first, found }, i) => {
    const w = levels ? found.map((v) => Math.trunc(v * UNIT + (v < 0 ? -0.5 : 0.5))) : found;
    for (let other = 0; other < (wide ? height : width); other++) {
      for (let c = 0; c < channels; c++) {
        let at = wide ? other * row + first * channels + c : first * row + other * channels + c;
        let sum = levels ? UNIT / 2 : 0;
        for (let k = 0; k < w.length; k++, at += jump) sum += old.levels[at] * w[k];
        const to = wide ? (other * width + i) * channels + c : (i * width + other) * channels + c;
        made[to] = levels ? Math.floor(sum / UNIT) : sum;
      }
    }
  });
  return { levels: made, width, height, channels };
}

// --- from a picture to what the model takes

const even = (x) => (Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x)); // Python's round

function scaled(raster) {
  const { way, filter, scaled: [height, width] } = data.pixels;
  const { width: w, height: h } = raster;
  if (way === "squash") return resized(raster, width, height, filter);
  if (way === "edge") {
    const side = Math.min(height, width);
    return w <= h
      ? resized(raster, side, Math.trunc((side * h) / w), filter)
      : resized(raster, Math.trunc((side * w) / h), side, filter);
  }
  const ratio = width / height;
  const [cw, ch] = w / h === ratio ? [w, h] : w / h >= ratio ? [ratio * h, h] : [w, w / ratio];
  const [left, top] = [(w - cw) / 2, (h - ch) / 2];
  return resized(raster, width, height, filter, [left, top, left + cw, top + ch]);
}

function cut(raster) {
  const half = data.pixels.floor ? Math.trunc : even;
  const [left, top] = [half((raster.width - WIDTH) / 2), half((raster.height - HEIGHT) / 2)];
  const { channels } = raster;
  const levels = new Uint8ClampedArray(WIDTH * HEIGHT * channels); // outside of the picture it is black
  for (let y = 0; y < HEIGHT; y++)
    for (let x = 0; x < WIDTH; x++)
      for (let c = 0; c < channels; c++) {
        const [i, j] = [top + y, left + x];
        const inside = i >= 0 && j >= 0 && i < raster.height && j < raster.width;
        levels[(y * WIDTH + x) * channels + c] = inside ? raster.levels[(i * raster.width + j) * channels + c] : 0;
      }
  return { levels, width: WIDTH, height: HEIGHT, channels };
}

// (1, C, H, W)
function normalised({ levels, channels }) {
  const { shift, gain } = data.pixels;
  const area = WIDTH * HEIGHT;
  return Float32Array.from({ length: channels * area }, (_, i) => {
    const c = Math.floor(i / area);
    return (levels[(i % area) * channels + c] / 255) * gain[c] + shift[c];
  });
}

// a file or an element as a raster: upright, transparency over white, grey for a model of one channel
async function raster(source) {
  const bitmap = await createImageBitmap(source, { colorSpaceConversion: "none" });
  const { width, height } = bitmap;
  const context = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, width, height).data;
  const channels = data.pixels.gain.length;
  const levels = new Uint8ClampedArray(width * height * channels);
  for (let i = 0; i < width * height; i++) {
    const [r, g, b] = [rgba[4 * i], rgba[4 * i + 1], rgba[4 * i + 2]];
    if (channels === 1) levels[i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
    else [levels[3 * i], levels[3 * i + 1], levels[3 * i + 2]] = [r, g, b];
  }
  return { levels, width, height, channels };
}

// --- drawing

// the end of the colours: a quantile of |values|, so that outliers do not wash out the rest
function end(values) {
  const sorted = Float64Array.from(values, Math.abs).filter(Number.isFinite).sort();
  if (!sorted.length) return 1;
  const at = data.quantile * (sorted.length - 1);
  const [low, high] = [sorted[Math.floor(at)], sorted[Math.ceil(at)]];
  return low + (high - low) * (at % 1) || sorted[sorted.length - 1] || 1;
}

const rgb = (code) => [1, 3, 5].map((i) => parseInt(code.slice(i, i + 2), 16));
const TABLES = { true: data.signed.map(rgb), false: data.positive.map(rgb) };

// the colour of a part of the scale, from -1 (or 0) to 1
function colour(part, signed) {
  const table = TABLES[signed];
  const depth = Math.min(1, Math.max(signed ? -1 : 0, part || 0));
  const place = (signed ? (depth + 1) / 2 : depth) * (table.length - 1);
  const i = Math.min(table.length - 2, Math.floor(place));
  return table[i].map((v, c) => v + (table[i + 1][c] - v) * (place - i));
}

function paint(canvas, width, height, at) {
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) image.data.set([...at(i), 255], 4 * i);
  context.putImageData(image, 0, 0);
}

// the picture with larger pixels, and the map over it in pale grey
function draw(seen, map) {
  const times = Math.ceil(LEAST / Math.min(WIDTH, HEIGHT));
  const [width, height, n] = [WIDTH * times, HEIGHT * times, seen.channels];
  const from = (i) => n * (Math.floor(Math.floor(i / width) / times) * WIDTH + Math.floor((i % width) / times));
  const pixel = (at) => [seen.levels[at], seen.levels[at + (n > 1)], seen.levels[at + 2 * (n > 1)]];
  const grey = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b) / 255;
  let [least, most] = [1, 0];
  for (let i = 0; i < WIDTH * HEIGHT; i++) {
    const v = grey(pixel(n * i));
    [least, most] = [Math.min(least, v), Math.max(most, v)];
  }
  const smooth = resized(
    { levels: Float32Array.from(map.values), width: map.width, height: map.height, channels: 1 },
    width, height, "bicubic", undefined, false,
  ).levels;
  paint(by("seen"), width, height, (i) => pixel(from(i)));
  paint(by("map"), width, height, (i) => {
    const shade = 1 - ((1 - data.cover) * (most - grey(pixel(from(i))))) / (most - least || 1);
    return colour(smooth[i] / map.end, map.signed).map((v) => Math.round(v * shade));
  });
}

// --- the page

let session, ort, seen, input; // the program, its runtime, the picture as levels and as the model takes it
let opened = 0; // how many pictures were chosen
let last = Promise.resolve(); // one run after another

function say(text, bad = false) {
  by("status").textContent = text;
  by("status").classList.toggle("bad", bad);
  by("status").classList.toggle("soft", !bad);
}
const painted = () => new Promise((go) => requestAnimationFrame(() => setTimeout(go)));
const reason = (error) => String(error?.message ?? error).split("\n")[0];

async function unpacked(id) {
  const text = by(id).textContent;
  by(id).remove();
  const characters = atob(text);
  const packed = new Uint8Array(characters.length);
  for (let i = 0; i < packed.length; i++) packed[i] = characters.charCodeAt(i);
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

async function start() {
  if (typeof WebAssembly !== "object") throw Error("this browser has no WebAssembly");
  const engine = new Blob([await unpacked("engine")], { type: "text/javascript" });
  ort = await import(URL.createObjectURL(engine));
  Object.assign(ort.env.wasm, { numThreads: 1, wasmBinary: await unpacked("wasm") });
  ort.env.logLevel = "error";
  session = await ort.InferenceSession.create(new Uint8Array(await unpacked("program")), { executionProviders: ["wasm"] });
  delete ort.env.wasm.wasmBinary;
}

async function run(target) {
  const feeds = {
    input: new ort.Tensor("float32", input, [1, seen.channels, HEIGHT, WIDTH]),
    target: new ort.Tensor("int64", BigInt64Array.of(BigInt(target)), [1]),
  };
  const found = await session.run(feeds);
  const logits = Array.from(found.model.data, Number);
  const top = Math.max(...logits);
  const sum = logits.reduce((a, v) => a + Math.exp(v - top), 0);
  const [, height, width] = found.values.dims;
  return {
    input, values: Array.from(found.values.data), width, height, chosen: Number(found.chosen.data[0]), logits,
    probabilities: logits.map((v) => Math.exp(v - top) / sum), output: found.output.data[0],
    error: found.completeness_error.data[0],
  };
}

// explain a class, or -1, the model's own answer
function explain(target) {
  return (last = last.then(async () => {
    say("Explaining …");
    await painted();
    const began = performance.now();
    const found = await run(target);
    if (!found.logits.every(Number.isFinite)) throw Error("the model answers nan: there is nothing to explain");
    show({ ...found, ms: performance.now() - began });
    say("");
  }).catch((error) => say(`This picture could not be explained: ${reason(error)}`, true)));
}

function show(found) {
  const signed = found.values.some((v) => v < 0);
  const map = { ...found, signed, end: end(found.values) };
  by("answer").hidden = false;
  draw(seen, map);
  const ends = signed ? [`against ${short(-map.end, 3)}`, `${short(map.end, 3)} for`] : ["0", short(map.end, 3)];
  [by("low").textContent, by("high").textContent] = ends;
  by("scale").style.background = `linear-gradient(to right, ${data[signed ? "signed" : "positive"].join(", ")})`;
  const owed = Number.isNaN(found.error) ? "it promises no sum" : `completeness error ${number(found.error)}`;
  by("caption").textContent = `${named(found.chosen)}, output ${short(found.output, 3)}\n${owed}`;
  list(found);
  window.result = map; // for whoever wants the numbers
  document.body.dataset.shown = Number(document.body.dataset.shown ?? 0) + 1;
}

// the largest answers; the order stays while one picture is explained
function list({ probabilities, chosen }) {
  const order = probabilities.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]).slice(0, CLASSES);
  by("classes").replaceChildren(...order.map((index) => {
    const button = document.createElement("button");
    button.style.setProperty("--share", `${100 * probabilities[index]}%`);
    button.setAttribute("aria-pressed", index === chosen);
    button.dataset.index = index;
    for (const text of [named(index), percent(probabilities[index])])
      button.append(Object.assign(document.createElement("span"), { textContent: text }));
    button.onclick = async () => {
      await explain(index);
      by("classes").querySelector(`[data-index="${index}"]`)?.focus();
    };
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
}

// a picture: a file, or the element of an example
async function open(source) {
  const mine = ++opened;
  say("Reading the picture …");
  await painted();
  let found;
  try {
    await source.decode?.(); // an example may not be loaded yet
    found = cut(scaled(await raster(source)));
  } catch {
    if (mine !== opened) return;
    return say(`${source.name ? `“${source.name}”` : "This"} is no picture that this browser can read.`, true);
  }
  if (mine !== opened) return; // another was chosen since
  seen = found;
  input = normalised(seen);
  for (const button of buttons) button.setAttribute("aria-pressed", button.firstChild === source);
  return explain(-1);
}

const buttons = [...document.querySelectorAll("#examples button")];
by("choose").onclick = () => by("file").click();
by("file").onchange = (event) => {
  if (event.target.files[0]) open(event.target.files[0]);
  event.target.value = ""; // the same file may be chosen again
};
buttons.forEach((button) => (button.onclick = () => open(button.firstChild)));
const given = (transfer) => [...(transfer?.files ?? [])][0];
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.toggle("over", Boolean(session));
});
addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  if (!session) return;
  if (given(event.dataTransfer)) open(given(event.dataTransfer));
  else say("That is no file: drop a picture from a folder.", true);
});
addEventListener("paste", (event) => session && given(event.clipboardData) && open(given(event.clipboardData)));

try {
  const began = performance.now();
  await painted();
  await start();
  window.loaded = performance.now() - began;
  for (const button of [by("choose"), ...buttons]) button.disabled = false;
  if (buttons.length) await open(buttons[0].firstChild);
  else say("The model is ready.");
} catch (error) {
  say(`The model cannot run here: ${reason(error)}.`, true);
}
