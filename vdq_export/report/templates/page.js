// What moves on the page: the clips, the plots, the layer whose ranges are shown.
"use strict";

const numbers = (id) => JSON.parse(document.getElementById(id).textContent);
const frameMs = 180;

// texts: what the columns that hold numbers mean.
function showCell(data, texts, indices) {
  const list = document.getElementById("cell");
  list.replaceChildren();
  list.hidden = indices.length === 0;
  if (list.hidden) return;
  const names = { layer: "layer", bin: "bin", when: "serves", sqnr: "SQNR", worst: "worst step", numbers: "numbers", range: "range",
    clip: "clip", alpha: "alpha", rank: "rank", place: "folded", why: "why" };
  for (const [field, title] of Object.entries(names)) {
    const found = data[field][indices[0]];
    const text = typeof found === "number" ? texts[found] : found;
    if (!text) continue;
    const term = document.createElement("dt");
    term.textContent = title;
    const told = document.createElement("dd");
    told.textContent = text;
    list.append(term, told);
  }
}

function startPlayer() {
  const slider = document.getElementById("frame");
  if (!slider) return;
  const canvases = [...document.querySelectorAll("#clips canvas")];
  const button = document.getElementById("play");
  const count = Number(slider.max) + 1;
  const draw = () => {
    const frame = Number(slider.value);
    document.getElementById("frame-number").textContent = `${frame + 1} of ${count}`;
    for (const canvas of canvases) {
      const picture = canvas.nextElementSibling;
      const { frames, columns } = canvas.dataset;
      const shown = Math.min(frame, Number(frames) - 1);
      const left = (shown % columns) * canvas.width;
      const top = Math.floor(shown / columns) * canvas.height;
      const size = [canvas.width, canvas.height];
      if (picture.complete) canvas.getContext("2d").drawImage(picture, left, top, ...size, 0, 0, ...size);
    }
  };
  let timer = 0;
  const play = (on) => {
    clearInterval(timer);
    timer = on ? setInterval(() => { slider.value = (Number(slider.value) + 1) % count; draw(); }, frameMs) : 0;
    button.textContent = on ? "Pause" : "Play";
  };
  button.addEventListener("click", () => play(!timer));
  slider.addEventListener("input", () => { play(false); draw(); });
  for (const canvas of canvases) canvas.nextElementSibling.addEventListener("load", draw);
  draw();
  play(count > 1 && !matchMedia("(prefers-reduced-motion: reduce)").matches);
}

function rangeData(network, value, boxes) {
  const found = {};
  for (const branch of ["cond", "uncond"]) {
    const data = { t: [], lo: [], hi: [], raw_lo: [], raw_hi: [] };
    network.branch.forEach((one, slot) => {
      if (one !== branch || value.lo[slot] === null) return;
      data.t.push(network.t[slot]);
      data.raw_lo.push(value.lo[slot]);
      data.raw_hi.push(value.hi[slot]);
      data.lo.push(value.afterLo.length ? value.afterLo[slot] : value.lo[slot]);
      data.hi.push(value.afterHi.length ? value.afterHi[slot] : value.hi[slot]);
    });
    found[branch] = data;
  }
  for (const branch of ["any", "cond", "uncond"]) {
    const mine = boxes.filter((one) => one[6] === branch);
    const column = (index) => mine.map((one) => one[index]);
    const data = { bin: column(0), left: column(1), right: column(2), lo: column(3), hi: column(4), why: column(5) };
    found[`boxes-${branch}`] = data;
  }
  found.edges = { t: network.edges };
  return found;
}

function startRanges(plot) {
  const choose = document.getElementById("layer");
  const choices = [];
  for (const network of numbers("range-numbers")) {
    for (const value of network.values) {
      for (const [layer, none, boxes] of value.layers) {
        const option = new Option(network.name ? `${network.name}: ${layer}` : layer, String(choices.length));
        choices.push({ network, value, none, boxes: value.boxes[boxes] });
        choose.add(option);
      }
    }
  }
  const show = () => {
    const { network, value, none, boxes } = choices[Number(choose.value)];
    for (const [name, data] of Object.entries(rangeData(network, value, boxes))) {
      plot.document.get_model_by_name(name).data = data;
    }
    const seen = [value.lo, value.hi, value.afterLo, value.afterHi, ...boxes.map((one) => one.slice(3, 5))];
    const ends = seen.flat().filter((one) => one !== null);
    const [lowest, highest] = [Math.min(...ends), Math.max(...ends)];
    const room = 0.05 * (highest - lowest || 1);
    plot.y_range.setv({ start: lowest - room, end: highest + room });
    plot.x_range.setv({ start: Math.max(...network.t, ...network.edges), end: Math.min(...network.t, ...network.edges) });
    const [legend] = plot.above.filter((one) => one.type === "Legend");
    if (labels.narrow()) legend.ncols = 3;
    for (const item of legend.items) {
      item.visible = item.renderers.some(({ data_source }) => Object.values(data_source.data)[0].length > 0);
    }
    document.getElementById("layer-name").textContent = choose.selectedOptions[0].text;
    const others = value.layers.length > 1 ? `, read by ${value.layers.map(([name]) => name).join(", ")}` : "";
    const folded = value.afterLo.length ? "" : "; neither smoothed nor rotated";
    document.getElementById("ranges-note").textContent = `${value.value}${others}${folded}${none && `; ${none}`}`;
  };
  choose.addEventListener("change", show);
  if (choices.length) show();
}

// How the labels of the heat map's axes fit. figures.py has them asked for whenever they are drawn.
const labels = {
  line: 14, // pixels of a label across its text
  longest: 18, // letters
  width: () => document.getElementById("heat").clientWidth,
  narrow: () => labels.width() < 600,
  room: (count) => (labels.width() - (labels.narrow() ? 150 : 250)) / count,
  flat: (count) => labels.room(count) > 70,
  // On a phone long names would leave no room for the cells: their ends stay.
  layer: (text) => labels.narrow() && text.length > labels.longest ? `…${text.slice(1 - labels.longest)}` : text,
  // Of many bins every n-th is named.
  bin: (text, place, count) => {
    if (labels.flat(count)) return text;
    return place % Math.ceil(labels.line / labels.room(count)) ? "" : text.replace("\n", " ");
  },
};

function turnLabels(plot) {
  const turned = labels.flat(plot.x_range.factors.length) ? 0 : Math.PI / 2;
  for (const axis of [...plot.above, ...plot.below]) {
    if (axis.type === "CategoricalAxis") axis.major_label_orientation = turned;
  }
}

async function start() {
  startPlayer();
  for (const [name, plot] of Object.entries(numbers("plots"))) {
    const views = await Bokeh.embed.embed_item({ ...plot, target_id: name });
    const [{ model }] = [...views];
    if (name === "heat") turnLabels(model);
    if (name === "ranges") startRanges(model);
  }
  document.body.dataset.state = "ready";
}

start();
