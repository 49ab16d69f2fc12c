// Let the page of serve-demo make clips in headless Chromium: node browser.mjs CHROMIUM RESULTS URL …
import { writeFile } from "node:fs/promises";
import { chromium } from "playwright-core";

const [executablePath, target, ...urls] = process.argv.slice(2);
const off = ["gpu", "quic", "background-networking", "component-update", "sync"].map((name) => `--disable-${name}`);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--no-first-run", ...off] });
const results = [];
try {
  for (const url of urls) {
    const page = await browser.newPage();
    const requests = [];
    const complaints = [];
    page.on("request", (request) => requests.push(request.url()));
    page.on("pageerror", (error) => complaints.push(String(error)));
    page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
    await page.goto(url);
    const ended = () => ["done", "error"].includes(document.body.dataset.state);
    await page.waitForFunction(ended, null, { timeout: 240_000 });
    const seen = await page.evaluate(() => ({
      state: document.body.dataset.state,
      isolated: globalThis.crossOriginIsolated,
      text: document.querySelector("main").innerText,
      rows: document.querySelectorAll("#rows tr").length,
      drawn: [...document.querySelectorAll("#frames canvas")].map((canvas) => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return Array.from(data.filter((_, i) => i % 4 === 0));
      }),
      made: globalThis.made,
    }));
    results.push({ ...seen, requests, complaints });
    await page.close();
  }
} finally {
  await browser.close();
}
await writeFile(target, JSON.stringify(results));
