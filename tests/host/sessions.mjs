// Which sessions a clip loads and lets go, in order: node sessions.mjs BUNDLE CASE RESULTS. Graphs give zeros here.
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { Bundle, readCase } from "../../vdq_export/host/loop.mjs";

const [folder, source, target] = process.argv.slice(2);
const events = [];
const opened = [];
const bytes = async (place) => new Uint8Array(await readFile(place)).buffer;
const read = (path) => (opened.push(path), bytes(join(folder, path)));

class Session {
  static async create(graph, options) {
    const made = Object.assign(new Session(), { name: opened.filter((path) => path.endsWith(".onnx")).at(-1) });
    events.push(["load", made.name, options.externalData.map(({ path, data }) => [path, data.byteLength])]);
    return made;
  }
  async run(feeds, [output]) {
    events.push(["run", this.name, feeds.timestep.data[0]]);
    await new Promise((resolve) => setTimeout(resolve, 20)); // as long as loading takes
    return { [output]: { data: feeds.hidden_states.data.map(() => 0) } };
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
