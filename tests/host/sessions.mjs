// Which sessions a clip loads and lets go, in order: node sessions.mjs BUNDLE CASE GRAPHS RESULTS. Graphs give zeros
// here, of the shapes that GRAPHS says: {graph: {inputs: [name], outputs: {name: shape}}}.
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { Bundle, readCase } from "../../vdq_export/host/loop.mjs";

const [folder, source, described, target] = process.argv.slice(2);
const graphs = JSON.parse(await readFile(described));
const events = [];
const opened = [];
const bytes = async (place) => new Uint8Array(await readFile(place)).buffer;
const read = (path) => (opened.push(path), bytes(join(folder, path)));

class Session {
  static async create(graph, options) {
    const name = opened.filter((path) => path.endsWith(".onnx")).at(-1);
    const { inputs: inputNames, outputs } = graphs[name];
    const made = Object.assign(new Session(), { name, inputNames, outputs, outputNames: Object.keys(outputs) });
    events.push(["load", name, options.externalData.map(({ path, data }) => [path, data.byteLength])]);
    return made;
  }
  async run(feeds) {
    const missing = this.inputNames.filter((name) => !(name in feeds));
    if (missing.length || Object.keys(feeds).length !== this.inputNames.length) throw new Error(`fed wrongly: ${missing}`);
    events.push(["run", this.name]);
    await new Promise((resolve) => setTimeout(resolve, 20)); // as long as loading takes
    const zeros = (shape) => new Tensor("float32", new Float32Array(shape.reduce((a, b) => a * b, 1)), shape);
    return Object.fromEntries(Object.entries(this.outputs).map(([name, shape]) => [name, zeros(shape)]));
  }
  async release() {
    events.push(["release", this.name]);
  }
}
class Tensor {
  constructor(dtype, data, shape) {
    Object.assign(this, { dtype, data, shape });
  }
}

const bundle = await Bundle.open({ InferenceSession: Session, Tensor }, read);
const item = readCase(await bytes(source));
for await (const _ of bundle.generate(item)) continue;
await bundle.close();
await writeFile(target, JSON.stringify({ events, opened }));
