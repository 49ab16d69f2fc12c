// What left the graphs of a bundle's bins (docs/hoisting.md): gives them the values they take in its place.

const EDGE_TOLERANCE = 1e-6; // relative: t travels as float32, the calibrated ends are float64
export const slack = (t) => EDGE_TOLERANCE * Math.max(1, Math.abs(t));

/** Of sessions of these graphs: they run seldom, on few rows. Weights stay in 8 bits, and inputs in float. */
const SETTINGS = {
  graphOptimizationLevel: "basic", // above it, inputs of 8-bit weights are rounded to 8 bits
  enableCpuMemArena: false,
  enableMemPattern: false,
  extra: { "session.disable_prepacking": "1" },
};
const graphsOf = ({ prompt, mixed, step }) => Object.entries({ prompt, mixed, step }).filter(([, graph]) => graph);

/** Options of a graph's session; `entries`: configuration entries of the bins' graphs. */
export function settings({ hoisted }, graph, entries) {
  const own = hoisted.flatMap(graphsOf).some(([, one]) => one === graph) ? SETTINGS : { extra: entries };
  return { executionProviders: ["cpu"], logSeverityLevel: 3, ...own };
}

/** What has to be loaded for some bins: graphs needed `soon`, and `seldom`, at timesteps that no table has. */
export function graphsFor({ bins: every, hoisted, reuse }, bins) {
  const parts = hoisted.filter((one) => one.bins.some((index) => bins.includes(index))).flatMap(graphsOf);
  const of = (isStep) => parts.flatMap(([kind, graph]) => ((kind === "step") === isStep ? [graph] : []));
  const probes = reuse?.threshold ? reuse.probes : [];
  const own = [...bins.map((index) => every[index]), ...probes].map(({ graph }) => graph);
  return { soon: [...own, ...of(false)], seldom: of(true) };
}

/** The values of one clip. Its prompts are those of its branches, whatever it is given later. */
export class Ahead {
  runs = { prompt: 0, step: 0, mixed: 0, rows: 0 }; // of each graph; rows: calls whose timestep is in the tables
  warned = 0;
  branches = new Map(); // branch -> {parts, t, row, prompt, step, mixed}: what is known of its last call
  constructor(bundle) {
    this.bundle = bundle;
  }
  get told() {
    return { ...this.runs };
  }
  /** {name: tensor} that a session takes for a call of bin `index`; `inputs`: those of the model. */
  async feeds(index, branch, { inputNames }, inputs) {
    const parts = this.bundle.schedule.hoisted.find(({ bins }) => bins.includes(index));
    if (!parts) return Object.fromEntries(inputNames.map((name) => [name, inputs[name]]));
    const t = Number(inputs[this.bundle.manifest.signature.timestep].data[0]);
    return this.values(this.call(parts, branch, t), inputNames, inputs);
  }
  async values(call, names, inputs) {
    const found = {};
    for (const name of names) {
      found[name] = inputs[name] ?? this.row(call, name) ?? (await this.made(call, name, inputs));
    }
    return found;
  }
  /** What is known for a call: of the prompt from all its branch's calls, of the timestep from those of this step. */
  call(parts, branch, t) {
    const last = this.branches.get(branch);
    if (last?.parts === parts && last.t === t) return last;
    const call = { parts, t, row: this.find(parts, t), prompt: last?.parts === parts ? last.prompt : undefined };
    this.runs.rows += call.row === undefined ? 0 : 1;
    this.branches.set(branch, call);
    return call;
  }
  /** The row of the tables for t; undefined where the step graph has to make what it would hold. */
  find({ tables, timesteps, step }, t) {
    if (!tables) return undefined;
    const row = timesteps.findIndex((one) => Math.abs(one - t) <= slack(t));
    if (row >= 0) return row;
    if (step) return undefined;
    const { schedule } = this.bundle, what = `timestep ${t} has no row in the tables`;
    if (schedule.uncalibrated === "refuse") throw new Error(what);
    if (!this.warned++) schedule.warn(`${what}; using the nearest`); // once a clip
    return timesteps.reduce((best, one, i) => (Math.abs(one - t) < Math.abs(timesteps[best] - t) ? i : best), 0);
  }
  /** A tensor from the tables; undefined for what is not in them. */
  row({ parts: { tables }, row }, name) {
    const table = row === undefined ? undefined : this.bundle.tables[tables][name];
    if (!table) return undefined;
    const { dtype, shape: [, ...shape], data } = table, size = shape.reduce((product, n) => product * n, 1);
    return new this.bundle.ort.Tensor(dtype, data.slice(row * size, (row + 1) * size), shape);
  }
  /** A value that a graph gives, run on what it takes unless that has been done for this call. */
  async made(call, name, inputs) {
    for (const [kind, graph] of graphsOf(call.parts)) {
      const session = await this.bundle.session(graph);
      if (!session.outputNames.includes(name)) continue;
      if (!call[kind]) {
        call[kind] = await session.run(await this.values(call, session.inputNames, inputs));
        this.runs[kind] += 1;
      }
      return call[kind][name];
    }
    throw new Error(`nothing gives ${name}, which a graph takes`);
  }
}
