"use strict";
const tip = document.getElementById("tip");
const steps = [...document.querySelectorAll(".step")];
const chooser = document.querySelector(".tools select");
let current = 0;
let zoom = 1;  // letters can be read; the whole is one click away

function place(x, y) {
  const { offsetWidth: w, offsetHeight: h } = tip;
  tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - w - 8))}px`;
  tip.style.top = `${y + 18 + h < innerHeight ? y + 18 : Math.max(8, y - h - 12)}px`;
}

function twins(box, on) {
  if (!box?.dataset.key) return;
  for (const one of box.closest(".sides").querySelectorAll(`[data-key="${box.dataset.key}"]`)) {
    one.classList.toggle("twin", on);
  }
}

function hide() {
  tip.hidden = true;
  for (const one of document.querySelectorAll(".twin")) one.classList.remove("twin");
}

function show(target, x, y) {
  hide();
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  twins(target, true);
  place(x, y);
}

document.addEventListener("pointerover", (event) => {
  const target = event.target.closest?.("[data-tip]");
  if (target) show(target, event.clientX, event.clientY);
  else hide();
});
document.addEventListener("pointermove", (event) => tip.hidden || place(event.clientX, event.clientY));
document.addEventListener("focusin", (event) => {
  const target = event.target.closest?.("[data-tip]");
  if (!target?.matches(":focus-visible")) return;
  const { left, bottom } = target.getBoundingClientRect();
  show(target, left, bottom);
});

function widths() {
  for (const svg of steps[current]?.querySelectorAll("svg") ?? []) {
    const full = Number(svg.dataset.width);
    const room = svg.parentElement.clientWidth;
    svg.setAttribute("width", zoom === "fit" ? Math.min(full, room) : full * zoom);
  }
}

function toFirstChange(step) {
  const box = step.querySelector(".box.only, .box.changed") ?? step.querySelector(".box");
  const pane = box?.closest(".pane");
  if (!box) return;
  const [there, here] = [box.getBoundingClientRect(), pane.getBoundingClientRect()];
  pane.scrollBy(there.left - here.left - here.width / 2, there.top - here.top - here.height / 3);
}

function go(number) {
  if (number < 0 || number >= steps.length) return;
  current = number;
  steps.forEach((step, index) => { step.style.display = index === number ? "" : "none"; });
  if (chooser) chooser.value = String(number);
  document.body.dataset.step = steps[number].dataset.name;
  hide();
  widths();
  toFirstChange(steps[number]);
}

for (const button of document.querySelectorAll("[data-go]")) {
  button.addEventListener("click", () => go(current + Number(button.dataset.go)));
}
chooser?.addEventListener("change", () => go(Number(chooser.value)));
for (const button of document.querySelectorAll("[data-zoom]")) {
  button.addEventListener("click", () => {
    const wanted = button.dataset.zoom;
    const svg = steps[current].querySelector("svg");
    const now = svg.getAttribute("width") / svg.dataset.width;
    zoom = wanted === "fit" ? "fit" : wanted === "1" ? 1 : now * Number(wanted);
    widths();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
  if (event.target.closest("input, select") || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "ArrowRight") go(current + 1);
  if (event.key === "ArrowLeft") go(current - 1);
});
for (const sides of document.querySelectorAll(".sides")) {
  const panes = [...sides.querySelectorAll(".pane")];
  for (const pane of panes) {
    pane.addEventListener("scroll", () => {
      for (const other of panes) {
        if (other === pane) continue;
        other.scrollTop = pane.scrollTop;
        other.scrollLeft = pane.scrollLeft;
      }
    });
  }
}
const filter = document.getElementById("filter");
filter?.addEventListener("input", () => {
  const words = filter.value.toLowerCase();
  const rows = [...filter.closest("section").querySelectorAll("tbody tr")];
  for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(words);
  document.getElementById("count").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
});
addEventListener("resize", widths);
go(0);
document.body.dataset.state = "done";
