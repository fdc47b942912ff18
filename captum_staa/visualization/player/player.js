"use strict";
// Draws the same pixels as visualization/overlay.py, with the same formulas. A test compares both.
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const total = data.frames.length;
const UNSEEN = 0.82 * 255; // gray level of overlay.UNSEEN

let at = data.start;
let timer = null;
let pictures = []; // decoded frames
let explanation = data.explanations[0];
const most = Math.max(...data.explanations.map(({ panels }) => panels.length)); // classes beside each other
const several = () => explanation.panels.length > 1;
const all = (selector) => [...document.querySelectorAll(selector)];

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function picture(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  return image;
}

// For each row (or column) of the frame: the two nearest rows of the map and the interpolation weight; null outside of
// the crop that the model saw.
function between(length, begin, extent, cells) {
  return Array.from({ length }, (_, i) => {
    const share = (i + 0.5 - begin) / extent;
    if (share < 0 || share > 1) return null;
    const point = Math.min(Math.max(share * cells - 0.5, 0), cells - 1);
    const low = Math.floor(point);
    return [low, Math.min(low + 1, cells - 1), point - low];
  });
}

// Weights of the positive and the negative plane of bytes for each sign. visualization/html.py packs the positive
// values, then the magnitudes of the negative values, both as square roots of fractions of their largest value.
const WEIGHTS = { absolute_value: [1, 1], positive: [1, 0], negative: [0, 1], all: [1, -1] };

// Returns a function from the index of a cell to its value for a sign, in [-1, 1].
function reader({ bytes, peaks }, sign) {
  const scale = explanation.scales[sign] || Infinity;
  const [above, below] = [0, 1].map((plane) =>
    Float32Array.from({ length: 256 }, (_, byte) => (WEIGHTS[sign][plane] * (byte / 255) ** 2 * peaks[plane]) / scale),
  );
  const plane = bytes.length / 2;
  return (cell) => Math.min(Math.max(above[bytes[cell]] + below[bytes[plane + cell]], -1), 1);
}

function shown() {
  const method = byId("method").value;
  const sign = byId("sign").value;
  return { method, sign, alpha: Number(byId("opacity").value), colors: data.colors[sign] };
}

// Writes red, green and blue of one pixel to out[o..o+2]: v is the value of the map; r, g, b are the frame's color.
function mix(how, v, seen, r, g, b, out, o) {
  const { method, alpha, colors, sign } = how;
  const gray = 0.299 * r + 0.587 * g + 0.114 * b;
  if (!seen) {
    const share = method === "blended_heat_map" ? 0.35 * gray + 0.65 * UNSEEN : UNSEEN;
    out[o] = out[o + 1] = out[o + 2] = Math.round(share);
    return;
  }
  if (method === "masked_image" || method === "alpha_scaling") {
    const rest = method === "masked_image" ? 0 : 255 * (1 - Math.abs(v));
    out[o] = Math.round(r * Math.abs(v) + rest);
    out[o + 1] = Math.round(g * Math.abs(v) + rest);
    out[o + 2] = Math.round(b * Math.abs(v) + rest);
    return;
  }
  const color = 3 * Math.min(255, Math.floor(256 * (sign === "all" ? (v + 1) / 2 : v)));
  const opacity = method === "heat_map" ? 1 : alpha * Math.min(1, 2 * Math.abs(v));
  for (let k = 0; k < 3; k++) out[o + k] = Math.round((1 - opacity) * gray + opacity * colors[color + k]);
}

function draw() {
  const { width, height } = data;
  const how = shown();
  const plain = byId("clip").getContext("2d", { willReadFrequently: true });
  plain.drawImage(pictures[at], 0, 0, width, height);
  const canvases = all(".panel canvas");
  explanation.panels.forEach((panel, i) => {
    const image = plain.getImageData(0, 0, width, height);
    if (how.method !== "original_image") blend(image.data, panel, how);
    canvases[i].getContext("2d").putImageData(image, 0, 0);
  });
}

// Blends the map of a panel with the pixels of the frame, in place.
function blend(out, panel, how) {
  const { width, height } = data;
  const [rows, columns] = panel.size;
  const down = between(height, data.crop[0], data.crop[2], rows);
  const across = between(width, data.crop[1], data.crop[3], columns);
  const first = at * rows * columns;
  const read = reader(panel, how.sign);
  const value = (y, x) => read(first + y * columns + x);
  for (let y = 0, o = 0; y < height; y++) {
    for (let x = 0; x < width; x++, o += 4) {
      const [row, column] = [down[y], across[x]];
      let v = 0;
      if (row && column) {
        const upper = value(row[0], column[0]) * (1 - column[2]) + value(row[0], column[1]) * column[2];
        const lower = value(row[1], column[0]) * (1 - column[2]) + value(row[1], column[1]) * column[2];
        v = upper * (1 - row[2]) + lower * row[2];
      }
      mix(how, v, row && column, out[o], out[o + 1], out[o + 2], out, o);
    }
  }
}

function drawKey() {
  const how = shown();
  const hasKey = ["heat_map", "blended_heat_map"].includes(how.method);
  byId("key").hidden = !hasKey;
  byId("fading").hidden = how.method !== "blended_heat_map";
  all(".panel figcaption").forEach((caption, i) => {
    caption.textContent = how.method === "original_image" ? "clip" : nameOf(explanation.panels[i]);
    caption.classList.toggle("class", several());
  });
  const context = byId("bar").getContext("2d");
  const image = context.createImageData(256, 1);
  const low = how.sign === "all" ? -1 : 0;
  for (let i = 0; i < 256; i++) {
    mix(how, low + ((1 - low) * i) / 255, true, 127.5, 127.5, 127.5, image.data, 4 * i);
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  const scale = explanation.scales[how.sign];
  byId("ends").children[0].textContent = low ? "−full" : "0";
  byId("ends").children[2].textContent = "full";
  byId("scale").textContent =
    `${data.signs[how.sign]}; ${scale ? `full color = ${how.sign === "all" ? "±" : ""}${scale.toPrecision(3)}, ` : "zero everywhere, "}` +
    `in all frames${several() ? " and classes" : ""}` +
    (data.cropped ? "; pale border: outside of the crop that the model sees" : "");
}

// The class that a panel explains, or the explanation.
const nameOf = (panel) => (panel && several() ? panel.name : explanation.name);
const colorOf = (i) => data.classes[i % data.classes.length];

const abscissa = (frame) => ((frame + 0.5) / total) * 1000;

function drawTimeline() {
  const curves = explanation.panels.map((panel) => panel.curves[byId("sign").value]);
  const [low, high] = [Math.min(0, ...curves.flat()), Math.max(0, ...curves.flat())];
  const y = (value) => (high > low ? 95 - (90 * (value - low)) / (high - low) : 95);
  const line = (values, height) => values.map((value, i) => `${abscissa(i)} ${y(height(value))}`).join(" L");
  const filled = (keep) => `M${abscissa(0)} ${y(0)} L${line(curves[0], keep)} L${abscissa(total - 1)} ${y(0)} Z`;
  all(".curve").forEach((path, i) => {
    const values = curves[i];
    const drawn = values && (total > 1 ? `M${line(values, (value) => value)}` : `M0 ${y(values[0])} H1000`);
    path.setAttribute("d", drawn || "");
    path.style.stroke = several() ? colorOf(i) : "";
  });
  // The area below the curve shows evidence for and against one class. Those of several classes would cover each other.
  byId("for").setAttribute("d", several() ? "" : filled((value) => Math.max(value, 0)));
  byId("against").setAttribute("d", several() ? "" : filled((value) => Math.min(value, 0)));
  byId("zero").setAttribute("d", `M0 ${y(0)} H1000`);
  const [least, most] = [low, high].map((value) => Number(value.toPrecision(3)));
  const shaded = data.truth.length ? "; shaded: frames with evidence" : "";
  byId("unit").textContent = `${data.signs[byId("sign").value]} per frame, ${least} to ${most}${shaded}`;
}

function go(frame) {
  at = Math.min(Math.max(frame, 0), total - 1);
  byId("now").textContent = data.labels[at];
  byId("cursor").setAttribute("d", `M${abscissa(at)} 0 V100`);
  byId("timeline").setAttribute("aria-valuenow", at);
  byId("timeline").setAttribute("aria-valuetext", data.labels[at]);
  byId("clip").setAttribute("aria-label", `the clip, ${data.labels[at]}`);
  all(".panel canvas").forEach((canvas, i) => {
    canvas.setAttribute("aria-label", `${nameOf(explanation.panels[i])}, ${data.labels[at]}`);
  });
  markFrame();
  draw();
}

function stop() {
  clearInterval(timer);
  timer = null;
  byId("play").textContent = "play";
}

function toggle() {
  if (timer !== null) return stop();
  byId("play").textContent = "pause";
  timer = setInterval(() => go((at + 1) % total), 1000 / data.fps);
}

function step(frame) {
  stop();
  go(frame);
}

async function refresh() {
  explanation = data.explanations[byId("explanation").selectedIndex];
  for (const panel of explanation.panels) panel.bytes ??= await unpack(panel.packed);
  all(".panel").forEach((figure, i) => (figure.hidden = i >= explanation.panels.length));
  all("#bars .length").forEach((bar, i) => {
    bar.classList.toggle("explained", i in explanation.bars);
    bar.style.background = several() && i in explanation.bars ? colorOf(explanation.bars[i]) : "";
  });
  const onlyOneSign = ["masked_image", "alpha_scaling"].includes(byId("method").value);
  byId("sign").querySelector("[value=all]").disabled = onlyOneSign;
  if (onlyOneSign && byId("sign").value === "all") byId("sign").value = "absolute_value";
  byId("beside").hidden = !byId("aside").checked;
  drawKey();
  drawTimeline();
  drawWords();
  go(at);
}

function scrub(event) {
  const box = byId("timeline").getBoundingClientRect();
  step(Math.floor(((event.clientX - box.left) / box.width) * total));
}

function listen() {
  byId("back").onclick = () => step(at - 1);
  byId("on").onclick = () => step(at + 1);
  byId("play").onclick = toggle;
  byId("controls").oninput = byId("controls").onchange = refresh; // some assistive software sends only change events
  byId("controls").onsubmit = (event) => event.preventDefault();
  const timeline = byId("timeline");
  timeline.onpointerdown = (event) => {
    timeline.setPointerCapture(event.pointerId);
    scrub(event);
  };
  timeline.onpointermove = (event) => timeline.hasPointerCapture(event.pointerId) && scrub(event);
  const keys = {
    ArrowLeft: () => step(at - 1),
    ArrowRight: () => step(at + 1),
    Home: () => step(0),
    End: () => step(total - 1),
    " ": toggle,
  };
  if (data.words.length) {
    keys.ArrowUp = () => say(byId("explanation").selectedIndex - 1);
    keys.ArrowDown = () => say(byId("explanation").selectedIndex + 1);
  }
  document.onkeydown = (event) => {
    // A focused control handles these keys itself, and space presses a focused button.
    const handled = event.target.closest("select, input") || (event.key === " " && event.target.closest("button"));
    if (handled || event.ctrlKey || event.altKey || event.metaKey || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  };
}

function initialize() {
  for (let i = 1; i < most; i++) {
    const figure = byId("stage").appendChild(document.querySelector(".panel").cloneNode(true));
    figure.firstElementChild.id = `explained${i}`;
    byId("cursor").before(byId("curve").cloneNode());
  }
  all(".curve").forEach((path, i) => (path.id = i ? `curve${i}` : "curve"));
  all(".panel figcaption").forEach((caption, i) => caption.style.setProperty("--class", colorOf(i)));
  for (const canvas of all("#stage canvas")) [canvas.width, canvas.height] = [data.width, data.height];
  document.body.classList.toggle("tiny", Math.min(data.width, data.height) < 128);
  byId("stage").style.setProperty("--widest", `${Math.max(data.width, (384 * data.width) / data.height)}px`);
  for (const { name } of data.explanations) byId("explanation").add(new Option(name));
  byId("choose").hidden = data.explanations.length < 2;
  initializeWords();
  byId("method").value = data.method;
  byId("sign").value = data.sign;
  byId("opacity").value = data.alpha;
  byId("aside").checked = innerWidth >= 600;
  byId("timeline").setAttribute("aria-valuemax", total - 1);
  byId("span").children[0].textContent = data.labels[0];
  byId("span").children[2].textContent = data.labels[total - 1];
  const edges = data.truth.map((window) => [abscissa(window[0] - 0.5), abscissa(window[1] + 0.5)]);
  byId("truth").setAttribute("d", edges.map(([left, right]) => `M${left} 0 H${right} V100 H${left} Z`).join(" "));
  byId("answer").hidden = !data.predictions.length;
  data.predictions.forEach(([label, probability], i) => {
    const [term, bar, share] = ["dt", "dd", "dd"].map((tag) => byId("bars").appendChild(document.createElement(tag)));
    term.textContent = label;
    const length = bar.appendChild(document.createElement("div"));
    length.className = "length";
    length.style.width = `${100 * probability}%`;
    share.textContent = `${(100 * probability).toFixed(1)}%`;
  });
}

(async () => {
  initialize();
  pictures = await Promise.all(data.frames.map(picture));
  await refresh();
  listen();
  document.body.dataset.ready = "yes";
})().catch((error) => {
  byId("fault").hidden = false;
  byId("fault").textContent = `The player cannot start in this browser: ${error}`;
});
