// Runs the host loop off the page's thread, so that the page stays responsive. In: {number}. Out: {kind, …} as below.

import * as ort from "/runtime/ort.wasm.min.mjs";
import { Bundle, pixels, readCase } from "./loop.mjs";

// Threads need SharedArrayBuffer, which a browser gives to cross-origin isolated pages only.
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency ?? 1) : 1;

async function fetched(place) {
  const answer = await fetch(place);
  if (!answer.ok) throw new Error(`${place}: ${(await answer.text()) || answer.statusText}`);
  return answer.arrayBuffer();
}

const address = (path) => `/bundle/${path.split("/").map(encodeURIComponent).join("/")}`;
const warn = (text) => postMessage({ kind: "warning", text });
const opened = Bundle.open(ort, (path) => fetched(address(path)), warn);

async function generate(number) {
  const bundle = await opened;
  const { manifest, schedule } = bundle;
  const runtime = `onnxruntime-web ${ort.env.versions.web}, WebAssembly, ${ort.env.wasm.numThreads} threads`;
  const { model, target, recipe } = manifest, { bins, policy } = schedule;
  postMessage({ kind: "bundle", model: model.name, target, recipe: recipe?.name, bins, policy: policy.kind, runtime });
  const item = readCase(await fetched(`/case?number=${number}`));
  const shape = item.latent.shape.slice(1);
  postMessage({ kind: "case", text: item.metadata.text, shape, clip: pixels(item.latent.data) });
  const began = performance.now();
  for await (const { latent, ...step } of bundle.generate(item)) {
    postMessage({ kind: "step", ...step, clip: pixels(latent), total: performance.now() - began });
  }
  postMessage({ kind: "done" });
}

const fail = (error) => postMessage({ kind: "error", text: String(error.message ?? error) });
self.onmessage = ({ data }) => generate(data.number).catch(fail);
