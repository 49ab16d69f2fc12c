// Make one clip under Node:  node node.mjs BUNDLE CASE OUT
//
// CASE is what `vdq-export serve-demo` serves as /case?number=N (or what vdq_export.host.case writes). OUT becomes a
// safetensors file with the clip [C, F, H, W] in [0, 1]; its metadata tells what ran at each step, and how often what
// runs ahead of them did.
// onnxruntime-node is looked for from the working folder upwards: npm install onnxruntime-node

import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { Bundle, pixels, readCase } from "./loop.mjs";

const [folder, source, target] = process.argv.slice(2);
if (!target) {
  console.error("usage: node node.mjs BUNDLE CASE OUT");
  process.exit(2);
}

const ort = createRequire(join(process.cwd(), "here"))("onnxruntime-node");

async function read(place) {
  const bytes = await readFile(place);
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
}

const bundle = await Bundle.open(ort, (path) => read(join(folder, path)));
const item = readCase(await read(source));
const steps = [];
let latent, runs;
for await (const step of bundle.generate(item)) {
  ({ latent, runs } = step);
  steps.push({ t: step.t, bins: step.bins, precision: step.precision, milliseconds: step.milliseconds });
  const how = step.precision === null ? "reused" : `bin ${[...new Set(step.bins)]} ${step.precision}`;
  const time = `${step.milliseconds.toFixed(1)} ms`;
  console.log(`step ${step.step + 1}/${step.steps}  t ${step.t.toFixed(1)}  ${how}  ${time}`);
}
await bundle.close();

const clip = pixels(latent);
const header = {
  __metadata__: { steps: JSON.stringify(steps), runs: JSON.stringify(runs) },
  clip: { dtype: "F32", shape: item.latent.shape.slice(1), data_offsets: [0, clip.byteLength] },
};
const text = JSON.stringify(header);
const head = Buffer.from(text.padEnd(text.length + ((8 - (Buffer.byteLength(text) % 8)) % 8), " "));
const length = Buffer.alloc(8);
length.writeBigUInt64LE(BigInt(head.length));
await writeFile(target, Buffer.concat([length, head, Buffer.from(clip.buffer)]));
