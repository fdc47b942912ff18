// The answer of a video language model: its words as buttons, and a heat strip of words and frames. The maps of the
// words are the explanations of the page, in the same order.

// Shows a word, and optionally a frame.
async function say(index, frame) {
  byId("explanation").selectedIndex = Math.min(Math.max(index, 0), data.words.length - 1);
  await refresh();
  if (frame !== undefined) step(frame);
}

function initializeWords() {
  byId("spoken").hidden = byId("strip").hidden = byId("word-keys").hidden = !data.words.length;
  if (!data.words.length) return;
  byId("choose").hidden = true; // the words take its place
  byId("explanation").selectedIndex = data.first;
  data.words.forEach(({ text, needed }, i) => {
    const word = byId("words").appendChild(document.createElement("button"));
    word.type = "button";
    word.textContent = text;
    word.className = needed ? "word" : "word pale";
    word.onclick = () => say(i);
    const row = byId("rows").appendChild(document.createElement("div"));
    row.className = needed ? "row" : "row pale";
    const label = row.appendChild(document.createElement("span"));
    label.textContent = text;
    const canvas = row.appendChild(document.createElement("canvas"));
    [canvas.width, canvas.height] = [total, 1];
    row.onpointerdown = (event) => {
      const box = canvas.getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      say(i, share >= 0 ? Math.min(Math.floor(share * total), total - 1) : undefined);
    };
  });
  const [first, last] = [data.labels[0], data.labels[total - 1]];
  byId("rows").setAttribute("aria-label", `attribution of each word in each frame, ${first} to ${last}`);
}

// Scrolls a box, and not the page, so that a part of it is visible.
function reveal(box, part) {
  const top = part.offsetTop - box.offsetTop;
  const hidden = top + part.offsetHeight - box.clientHeight;
  box.scrollTop = Math.min(Math.max(box.scrollTop, hidden), top);
}

function drawWords() {
  if (!data.words.length) return;
  const chosen = byId("explanation").selectedIndex;
  const sign = byId("sign").value;
  const { text, probability, reliance, needed } = data.words[chosen];
  byId("note").textContent =
    `\u201c${text}\u201d: probability ${probability.toFixed(3)}, reliance on the video ` +
    `${reliance < 0 ? "\u2212" : "+"}${Math.abs(reliance).toFixed(2)} nats` +
    (needed ? "" : ". This word does not need the video, so its map means nothing.");
  all(".word").forEach((word, i) => word.setAttribute("aria-pressed", i === chosen));
  all(".row").forEach((row, i) => {
    row.classList.toggle("chosen", i === chosen);
    const values = data.explanations[i].panels[0].curves[sign];
    const largest = Math.max(...values.map(Math.abs)) || 1; // each row has its own scale
    const context = row.lastElementChild.getContext("2d");
    const image = context.createImageData(total, 1);
    values.forEach((value, frame) => {
      const share = sign === "all" ? (value / largest + 1) / 2 : value / largest;
      const color = 3 * Math.min(255, Math.floor(256 * share));
      image.data.set([...data.colors[sign].slice(color, color + 3), 255], 4 * frame);
    });
    context.putImageData(image, 0, 0);
  });
  reveal(byId("words"), all(".word")[chosen]);
  reveal(byId("rows"), all(".row")[chosen]);
}

// Marks the shown frame in the strip.
function markFrame() {
  if (!data.words.length) return;
  byId("rows").style.setProperty("--at", at / total);
  byId("rows").style.setProperty("--cell", 1 / total);
}
