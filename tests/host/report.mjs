// Use a report page in headless Chromium as people would: node report.mjs CHROMIUM RESULTS PAGE [SCREENSHOTS]
// Screenshots: a folder; report-desktop.png (light) and report-phone.png (dark) are written there.
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const [executablePath, target, file, pictures] = process.argv.slice(2);
const off = ["gpu", "quic", "background-networking", "component-update", "sync"].map((name) => `--disable-${name}`);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--no-first-run", ...off] });
const results = { requests: [], complaints: [] };

async function open(options) {
  const page = await browser.newPage(options);
  page.on("request", (request) => request.url().startsWith("data:") || results.requests.push(request.url()));
  page.on("pageerror", (error) => results.complaints.push(String(error)));
  page.on("console", (message) => {
    const ours = message.text().startsWith("Canvas2D"); // reading pixels back is what this script does
    if (!ours && ["error", "warning"].includes(message.type())) results.complaints.push(message.text());
  });
  await page.goto(pathToFileURL(file).href);
  await page.waitForFunction(() => document.body.dataset.state === "ready", null, { timeout: 60_000 });
  return page;
}

// Red of every pixel of every clip's canvas.
const drawn = (page) => page.evaluate(() => [...document.querySelectorAll("#clips canvas")].map((canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return Array.from(data.filter((_, i) => i % 4 === 0));
}));

const colours = (page) => page.evaluate(() => ({
  paper: getComputedStyle(document.body).backgroundColor,
  filter: getComputedStyle(document.getElementById("heat")).filter,
  play: document.querySelector("#play") && getComputedStyle(document.querySelector("#play")).display,
  layer: getComputedStyle(document.getElementById("layer-name")).display,
}));

async function playClips(page) {
  if (!await page.$("#frame")) return;
  const at = () => page.$eval("#frame", (slider) => Number(slider.value));
  const before = await at();
  await page.waitForFunction((seen) => Number(document.getElementById("frame").value) !== seen, before, { timeout: 5_000 });
  results.plays = true;
  await page.click("#play");
  const stopped = await at();
  await page.waitForTimeout(500);
  results.pauses = stopped === await at();
  results.frames = {};
  for (const frame of [0, 1]) {
    await page.fill("#frame", String(frame));
    results.frames[frame] = await drawn(page);
  }
  results.number = await page.textContent("#frame-number");
}

// The place of a cell of the heat map, in pixels of the window: of the first layer of a block, in the second bin.
const cell = (page) => page.evaluate(() => {
  const [view] = [...Bokeh.index.roots].filter((one) => one.model.name === "heat");
  view.el.scrollIntoView();
  const { left, top } = view.el.getBoundingClientRect();
  const { x_range, y_range } = view.model;
  const { bbox } = view.frame;
  const names = [...y_range.factors].reverse();
  const row = names.findIndex((name) => name.startsWith("blocks"));
  const x = left + bbox.left + bbox.width * 1.5 / x_range.factors.length;
  const y = top + bbox.top + bbox.height * (row + 0.5) / y_range.factors.length;
  return [x, y];
});

// The text of an element and of the shadow trees in it.
const textOf = (element) => {
  const walk = (node) => {
    if (node.nodeName === "STYLE") return "";
    if (node.nodeType === Node.TEXT_NODE) return node.textContent;
    return [...(node.shadowRoot?.childNodes ?? []), ...node.childNodes].map(walk).join(" ");
  };
  return walk(element);
};

async function readCells(page) {
  const [x, y] = await cell(page);
  await page.mouse.move(x - 3, y);
  await page.mouse.move(x, y);
  const tip = page.locator(".bk-Tooltip:visible").first();
  await tip.waitFor({ timeout: 5_000 });
  results.tooltip = await tip.evaluate(textOf);
  await page.mouse.click(x, y);
  await page.waitForSelector("#cell:not([hidden])", { timeout: 5_000 });
  results.cell = await page.innerText("#cell");
}

async function chooseLayer(page) {
  if (!await page.$("#layer")) return;
  const shown = () => page.evaluate(() => {
    const [view] = [...Bokeh.index.roots].filter((one) => one.model.name === "ranges");
    const plain = (data) => Object.fromEntries(Object.entries(data).map(([name, column]) => [name, Array.from(column)]));
    const names = ["cond", "uncond", "boxes-any", "boxes-cond", "boxes-uncond", "edges"];
    const found = names.map((name) => [name, plain(view.model.document.get_model_by_name(name).data)]);
    const { x_range, y_range } = view.model;
    return { ...Object.fromEntries(found), x: [x_range.start, x_range.end], y: [y_range.start, y_range.end] };
  });
  const layers = await page.$$eval("#layer option", (options) => options.map((one) => one.text));
  results.ranges = {};
  for (const [place, layer] of layers.entries()) {
    await page.selectOption("#layer", String(place));
    results.ranges[layer] = await shown();
  }
  results.note = await page.textContent("#ranges-note");
}

try {
  const page = await open({ viewport: { width: 1280, height: 900 }, colorScheme: "light" });
  results.light = await colours(page);
  results.text = await page.innerText("main");
  await playClips(page);
  if (pictures) await page.screenshot({ path: join(pictures, "report-desktop.png"), clip: { x: 0, y: 0, width: 1280, height: 1500 }, fullPage: true });
  await readCells(page);
  await chooseLayer(page);
  await page.emulateMedia({ colorScheme: "dark" });
  results.dark = await colours(page);
  await page.emulateMedia({ media: "print" });
  await page.setViewportSize({ width: 720, height: 900 });
  results.print = { ...await colours(page), sticksOut: await page.evaluate(() => document.documentElement.scrollWidth > 720) };
  await page.close();
  const phone = await open({ viewport: { width: 390, height: 844 }, colorScheme: "dark", reducedMotion: "reduce" });
  results.widest = await phone.evaluate(() => document.documentElement.scrollWidth);
  results.still = await phone.$("#frame") && await phone.$eval("#play", (button) => button.textContent === "Play");
  if (pictures) await phone.screenshot({ path: join(pictures, "report-phone.png"), clip: { x: 0, y: 0, width: 390, height: 1400 }, fullPage: true });
} finally {
  await browser.close();
}
await writeFile(target, JSON.stringify(results));
