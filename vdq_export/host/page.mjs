// The page around the host loop: asks the worker for a clip and draws what it tells.

const at = (id) => document.getElementById(id);
const worker = new Worker("worker.mjs", { type: "module" });
const time = (ms) => (ms < 1000 ? `${ms.toFixed(1)} ms` : `${(ms / 1000).toFixed(2)} s`);
const made = (tag, ...children) => {
  const element = document.createElement(tag);
  element.append(...children);
  return element;
};

let bins = [];
let shape = [1, 1, 16, 16]; // [C, F, H, W]
let clip = null;
let steps = [];
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Draw frame number `frame` of the clip in [0, 1]. One channel is grey, three are red, green and blue. */
function draw(canvas, frame) {
  const [channels, frames, height, width] = shape;
  Object.assign(canvas, { height, width });
  const image = new ImageData(width, height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let colour = 0; colour < 3; colour++) {
      const plane = channels === 3 ? colour : 0;
      image.data[4 * pixel + colour] = 255 * clip[(plane * frames + frame) * width * height + pixel];
    }
    image.data[4 * pixel + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function show() {
  for (const [frame, canvas] of [...at("frames").children].entries()) draw(canvas, frame);
  if (!playing) draw(at("video"), 0);
}

function play() {
  at("play").textContent = playing ? "Pause" : "Play";
  at("play").setAttribute("aria-pressed", String(playing));
}

function begin({ text, shape: its, clip: noise }) {
  [shape, clip, steps] = [its, noise, []];
  at("text").textContent = text;
  at("rows").replaceChildren();
  at("bars").replaceChildren();
  const canvases = Array.from({ length: shape[1] }, (_, frame) => {
    const canvas = made("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Frame ${frame + 1} of ${shape[1]}`);
    return canvas;
  });
  at("frames").replaceChildren(...canvases);
  show();
}

function bars(count) {
  const slowest = Math.max(...steps.map((one) => one.milliseconds));
  const items = Array.from({ length: count }, (_, number) => {
    const one = steps[number];
    const item = made("li", one?.bins.length ? String(one.bins[0]) : "");
    item.className = one ? (one.bins.length ? "ran" : "reused") : "waiting";
    item.style.setProperty("--bin", one?.bins[0] ?? 0);
    item.style.setProperty("--share", one ? one.milliseconds / slowest : 0);
    return item;
  });
  at("bars").replaceChildren(...items);
}

function stepped(step) {
  const { bins: its, precision } = step;
  const which = [...new Set(its)].join(", ") || "none: last output again";
  const name = precision ? `${which} (${precision})` : which;
  clip = step.clip;
  steps.push({ step: step.step, t: step.t, bins: its, precision, milliseconds: step.milliseconds });
  at("step").textContent = `${step.step + 1} of ${step.steps}`;
  at("bin").textContent = name;
  at("milliseconds").textContent = time(step.milliseconds);
  at("total").textContent = time(step.total);
  Object.assign(at("progress"), { value: step.step + 1, max: step.steps });
  const graph = its.length ? bins[its[0]].graph : "–";
  const cells = [step.step + 1, step.t.toFixed(1), name, graph, time(step.milliseconds)];
  at("rows").append(made("tr", ...cells.map((cell) => made("td", String(cell)))));
  bars(step.steps);
  show();
}

function finish(state, text) {
  document.body.dataset.state = state;
  at("status").textContent = text;
  at("go").disabled = false;
}

worker.onmessage = ({ data }) => {
  if (data.kind === "bundle") {
    bins = data.bins;
    const recipe = data.recipe ? `, recipe ${data.recipe}` : "";
    const what = `${data.model} for ${data.target}${recipe}: ${bins.length} bins, policy ${data.policy}.`;
    at("about").textContent = `${what} Running on ${data.runtime}.`;
  } else if (data.kind === "case") begin(data);
  else if (data.kind === "step") stepped(data);
  else if (data.kind === "warning") at("status").textContent = data.text;
  else if (data.kind === "error") finish("error", `This went wrong: ${data.text}`);
  else {
    globalThis.made = { clip: Array.from(clip), shape, steps }; // for the curious, and for tests
    finish("done", "Done: the clip was made on this device.");
  }
};
worker.onerror = (event) => finish("error", `This went wrong: ${event.message ?? "the worker did not load"}`);

function generate() {
  document.body.dataset.state = "running";
  at("go").disabled = true;
  at("status").textContent = "Generating …";
  worker.postMessage({ number: Number(at("number").value) });
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
at("play").addEventListener("click", () => {
  playing = !playing;
  play();
});
let frame = 0;
setInterval(() => {
  if (playing && clip) draw(at("video"), (frame = (frame + 1) % shape[1]));
}, 125);

const asked = new URLSearchParams(location.search).get("number");
if (asked !== null) at("number").value = asked;
play();
generate();
