// What a person finds on the pages of inspect --html and diff --html: node graph_page.mjs CHROMIUM RESULTS FILE …
import { writeFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const [executablePath, target, ...files] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--no-first-run", "--disable-gpu"] });
const results = [];
try {
  for (const file of files) {
    const page = await browser.newPage({ viewport: { width: 1200, height: 800 }, colorScheme: "dark" });
    const requests = [];
    const complaints = [];
    page.on("request", (request) => requests.push(request.url().split(":")[0]));
    page.on("pageerror", (error) => complaints.push(String(error)));
    page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
    await page.goto(pathToFileURL(file).href);
    await page.waitForFunction(() => document.body.dataset.state === "done", null, { timeout: 20_000 });
    const tip = () => page.locator("#tip").textContent();
    const shown = () => page.locator(".step:visible h2").first().innerText();
    const seen = { first: await shown(), steps: await page.locator(".step").count(), zoomed: [] };
    const box = page.locator(".step:visible .box").filter({ hasText: "MatMul" }).first();
    await box.scrollIntoViewIfNeeded();
    await box.hover();
    seen.box = await tip();
    seen.twins = await page.locator(".step:visible .box.twin").count();
    seen.line = await page.evaluate(() => {
      const line = [...document.querySelectorAll(".line")].find((one) => one.checkVisibility());
      line.querySelector(".reach").dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
      return document.getElementById("tip").textContent;
    });
    seen.changed = await page.evaluate(() => {
      const box = document.querySelector(".step .side + .side .box.only, .step .box.changed");
      box?.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
      return box ? document.getElementById("tip").textContent : "";
    });
    const width = () => page.locator(".step:visible svg").first().getAttribute("width");
    seen.opened = Number(await width());
    seen.room = await page.locator(".step:visible .pane").first().evaluate((pane) => pane.clientWidth);
    for (const zoom of ["1", "1.25", "fit"]) {
      await page.click(`[data-zoom="${zoom}"]`);
      seen.zoomed.push(Number(await width()));
    }
    await page.keyboard.press("ArrowRight");
    seen.second = await shown();
    const filter = page.locator("#filter");
    if (await filter.count()) {
      await filter.fill("no such thing");
      seen.filtered = await page.locator("#count").textContent();
    }
    seen.dark = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    seen.download = await page.locator("figcaption a").first().getAttribute("download");
    seen.wide = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
    await page.setViewportSize({ width: 360, height: 700 });
    seen.wideOnPhone = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
    results.push({ ...seen, requests, complaints });
    await page.close();
  }
} finally {
  await browser.close();
}
await writeFile(target, JSON.stringify(results));
