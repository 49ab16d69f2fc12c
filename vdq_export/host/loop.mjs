// The reference host loop of a bundle (docs/host-loop.md); needs nothing but what the host passes: `ort`, the module
// onnxruntime-node or onnxruntime-web, and `read`, an async function from a bundle path to an ArrayBuffer:
//   const bundle = await Bundle.open(ort, read);
//   for await (const step of bundle.generate(readCase(buffer))) show(step);

import { Ahead, graphsFor, settings, slack } from "./ahead.mjs";

const TYPES = { F32: ["float32", Float32Array], I64: ["int64", BigInt64Array], I32: ["int32", Int32Array] };
const ARRAYS = Object.fromEntries(Object.values(TYPES));
const parse = (buffer) => JSON.parse(new TextDecoder().decode(buffer));

/** {tensors: {name: {dtype, shape, data}}, metadata} of a safetensors file. */
export function safetensors(buffer) {
  const start = 8 + Number(new DataView(buffer).getBigUint64(0, true));
  const { __metadata__: metadata = {}, ...entries } = parse(buffer.slice(8, start));
  const read = ([name, { dtype, shape, data_offsets: [from, to] }]) => {
    if (!TYPES[dtype]) throw new Error(`tensor ${name} has the unknown type ${dtype}`);
    const [type, Kind] = TYPES[dtype];
    return [name, { dtype: type, shape, data: new Kind(buffer.slice(start + from, start + to)) }];
  };
  return { tensors: Object.fromEntries(Object.entries(entries).map(read)), metadata };
}

/** A clip to make: {latent: {name, shape, data}, branches: [{name, inputs: {input: tensor}}], metadata}. */
export function readCase(buffer) {
  const { tensors, metadata } = safetensors(buffer);
  const entries = Object.entries(tensors).map(([key, tensor]) => [...key.split("/", 2), tensor]);
  const inputs = (name) => Object.fromEntries(entries.flatMap(([of, key, data]) => (of === name ? [[key, data]] : [])));
  const branches = metadata.branches.split(" ").map((name) => ({ name, inputs: inputs(name) }));
  return { latent: { ...tensors.latent, name: metadata.latent }, branches, metadata };
}

/** schedule.json: which graph runs at which timestep. */
export class Schedule {
  constructor(data, warn = console.warn) {
    const defaults = { policy: { kind: "static" }, uncalibrated: "nearest", reuse: null, hoisted: [] };
    Object.assign(this, { ...defaults, ...data, warn, warned: 0 });
    this.steps = [...new Set(this.bins.flatMap((bin) => bin.steps))].sort((a, b) => b - a);
    this.precisions = this.policy.kind === "static" ? [this.policy.precision ?? ""] : ["low", "high"];
  }
  /** Index of the bin with lo <= t < hi; else of the nearest, which t must be allowed unless it is at its edge. */
  select(t, branch = "any", precision = "") {
    if (!Number.isFinite(t)) throw new Error(`timestep ${t} is not a finite number`);
    const judged = this.candidates(branch, precision).map((index) => {
      const [lo, hi] = this.bins[index].when.t, inside = lo === hi ? t === lo : lo <= t && t < hi;
      return { index, lo, hi, inside, distance: Math.max(lo - t, t - hi, 0) };
    });
    if (!judged.length) throw new Error(`no graph for branch ${branch} in precision "${precision}"`);
    const order = (a, b) => b.inside - a.inside || a.distance - b.distance || b.lo - a.lo;
    const [{ index, lo, hi, distance }] = judged.sort(order);
    if (distance > slack(t)) {
      const what = `timestep ${t} (${branch}) was not calibrated; the nearest bin is [${lo}, ${hi}]`;
      if (this.uncalibrated === "refuse") throw new Error(what);
      if (!this.warned++) this.warn(what); // once: a whole sampler outside the range is one mistake
    }
    return index;
  }
  /** Bins that calls after one of bin `index` may need soon; after the last the first, for the next clip. */
  upcoming(index, branch = "any") {
    const t = (bin) => this.bins[bin].when.t, falling = (a, b) => t(b)[0] - t(a)[0] || t(b)[1] - t(a)[1];
    const found = this.precisions.flatMap((precision) => {
      const order = this.candidates(branch, precision).sort(falling);
      const before = order.filter((other) => falling(other, index) <= 0), after = order.slice(before.length);
      return [...before.slice(-1), ...(after.length ? after : order).slice(0, 1)];
    });
    return [...new Set(found)].filter((other) => other !== index);
  }
  candidates(branch, precision) {
    const fits = ({ when }) => ["any", branch].includes(when.branch) && ["", precision].includes(when.precision);
    return this.bins.flatMap((bin, index) => (fits(bin) ? [index] : []));
  }
  /** Whether a clip of `steps` steps (0: of the calibrated ones) ends with this step. */
  isLast(step, t, steps) {
    const lowest = this.steps.at(-1);
    return steps ? step >= steps - 1 : step >= this.steps.length - 1 || t <= lowest + slack(lowest);
  }
}

/** ‖now − before‖₁ / ‖before‖₁ of two typed arrays. */
export function relativeChange(now, before) {
  const moved = now.reduce((sum, x, i) => sum + Math.abs(Math.fround(x - before[i])), 0);
  const whole = before.reduce((sum, x) => sum + Math.abs(x), 0);
  return whole ? moved / whole : moved ? Infinity : 0;
}

function highSteps({ pattern, share }, steps) {
  const floor = Math.floor(share * steps), rest = share * steps - floor;
  const high = rest > 0.5 || (rest === 0.5 && floor % 2) ? floor + 1 : floor; // halves go to the even number
  const abs = (i) => Math.floor(((i + 1) * high) / steps) > Math.floor((i * high) / steps);
  const rule = { stp: (i) => i >= steps - high, itp: (i) => i < high, abs }[pattern];
  if (!rule) throw new Error(`pattern ${pattern} is not for this host: numpy's generator draws its steps`);
  return Array.from({ length: steps }, (_, i) => rule(i));
}

/** The policy over the steps of one clip (docs/schedule.md). */
export class Policy {
  changed = 0; // e of the definition: the outputs' relative changes since the last high step
  estimated = 0; // a: the same for reuse, estimated from the modulated input
  constructor(schedule) {
    const { policy, reuse, steps } = schedule;
    Object.assign(this, { schedule, policy, cache: reuse?.threshold ? reuse : null });
    this.high = policy.kind === "pattern" ? highSteps(policy, policy.steps || steps.length) : null;
  }
  /** The precision a step runs in, or null when it takes the outputs of the step before. modulated: runs the probe. */
  async begin(step, t, modulated) {
    const { kind, precision = "", delta, start, end, steps } = this.policy;
    if (this.cache && this.reusable(step, t, await modulated())) return null;
    if (kind === "static") return precision;
    if (kind === "pattern" && step >= this.high.length) throw new Error(`the pattern ends at step ${step}`);
    if (kind === "pattern") return this.high[step] ? "high" : "low";
    const forced = (step === 0 && start === "high") || (end === "high" && this.schedule.isLast(step, t, steps));
    if (!forced && this.changed < delta) return "low";
    if (!forced) this.changed = 0;
    return "high";
  }
  /** See the output of the first call of a step that ran. */
  observe(output) {
    if (this.output) this.changed += relativeChange(output, this.output);
    this.output = output;
  }
  reusable(step, t, { expert, coefficients, value }) {
    const before = this.modulated;
    this.modulated = { expert, value };
    if (before?.expert === expert && !this.schedule.isLast(step, t, this.cache.steps)) {
      const change = relativeChange(value, before.value), p = coefficients.length ? coefficients : [1, 0];
      this.estimated += Number.isFinite(change) ? Math.max(0, p.reduce((sum, c) => sum * change + c, 0)) : Infinity;
      if (this.estimated < this.cache.threshold) return true;
    }
    this.estimated = 0;
    return false;
  }
}

/** [steps + 1] noise levels of the sampler flow-euler, from 1 to 0; t is 1000 times the level, in float32. */
export function noiseLevels({ steps, shift }) {
  const even = Array.from({ length: steps + 1 }, (_, i) => (i === steps ? 0 : 1 + i * (-1 / steps)));
  return even.map((s) => (shift * s) / (1 + (shift - 1) * s));
}

/** One Euler step in float32 along the guided velocity u + guidance · (c − u). */
function euler(latent, outputs, branches, guidance, change) {
  const of = (name) => outputs[branches.findIndex((branch) => branch.name === name)] ?? outputs[0];
  const c = of("cond"), u = of("uncond"), g = Math.fround(guidance), d = Math.fround(change), f = Math.fround;
  return latent.map((x, i) => x + f(d * f(u[i] + f(g * f(c[i] - u[i])))));
}

/** A latent of pixels in [-1, 1] as a clip in [0, 1]. */
export const pixels = (latent) => latent.map((x) => Math.min(1, Math.max(0, Math.fround(x / 2 + 0.5))));

export class Bundle {
  sessions = new Map(); // graph -> promise of its session
  stores = new Map(); // weight file -> promise of its bytes, read once for all graphs
  current = new Map(); // branch -> bin
  /** Open the bundle whose files `read` gives; their hashes are compared with the manifest's. */
  static async open(ort, read, warn = console.warn) {
    const bundle = Object.assign(new Bundle(), { ort, source: read, manifest: parse(await read("manifest.json")) });
    const { kind, format } = bundle.manifest;
    if (kind !== "vdq-export bundle" || format !== 1) throw new Error(`not a bundle of format 1: ${kind} ${format}`);
    bundle.schedule = new Schedule(parse(await bundle.read("schedule.json")), warn);
    const paths = bundle.schedule.hoisted.flatMap(({ tables }) => (tables ? [tables] : []));
    const tables = await Promise.all(paths.map(async (path) => [path, safetensors(await bundle.read(path)).tensors]));
    return Object.assign(bundle, { tables: Object.fromEntries(tables) });
  }
  async read(path) {
    const entry = this.manifest.files.find((file) => file.path === path);
    if (!entry) throw new Error(`the manifest lists no ${path}`);
    const data = await this.source(path), digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
    const sha256 = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (sha256 !== entry.sha256) throw new Error(`${path} is damaged: its sha256 is not the manifest's`);
    return data;
  }
  /** Make one clip; yields after each step. precision: null and no bins where it took the last outputs. */
  async *generate({ latent, branches }) {
    const { sampler } = this.schedule, { steps } = sampler, policy = new Policy(this.schedule), ahead = new Ahead(this);
    if (sampler.name !== "flow-euler") throw new Error(`this loop has no sampler ${sampler.name}, only flow-euler`);
    for (let step = 0, levels = noiseLevels(sampler), x = latent.data, outputs = []; step < steps; step++) {
      const began = performance.now(), t = Math.fround(1000 * levels[step]), bins = [];
      const feeds = branches.map(({ inputs }) => this.feeds(t, { ...inputs, [latent.name]: { data: x } }));
      const precision = await policy.begin(step, t, () => this.modulated(t, branches[0].name, feeds[0], ahead));
      if (precision !== null) {
        outputs = [];
        for (const [place, { name }] of branches.entries()) {
          bins.push(this.schedule.select(t, name, precision));
          outputs.push(await this.run(bins[place], name, feeds[place], ahead));
        }
        policy.observe(outputs[0]);
      }
      x = euler(x, outputs, branches, sampler.guidance, levels[step + 1] - levels[step]);
      yield { step, steps, t, bins, precision, milliseconds: performance.now() - began, latent: x, runs: ahead.told };
    }
  }
  /** The model's inputs as tensors: the timestep, and what the call brings. */
  feeds(t, given) {
    const { inputs, timestep } = this.manifest.signature;
    const values = ({ name, dtype, shape }) => {
      const size = shape.reduce((product, n) => product * n, 1);
      if (name === timestep) return new ARRAYS[dtype](size).fill(dtype === "int64" ? BigInt(Math.trunc(t)) : t);
      if (!given[name]) throw new Error(`there is no value for input ${name} at timestep ${t}`);
      return given[name].data;
    };
    return Object.fromEntries(inputs.map((one) => [one.name, new this.ort.Tensor(one.dtype, values(one), one.shape)]));
  }
  async run(index, branch, inputs, ahead) {
    const session = await this.session(this.schedule.bins[index].graph);
    const feeds = await ahead.feeds(index, branch, session, inputs);
    const [{ name }] = this.manifest.signature.outputs, running = session.run(feeds, [name]);
    if (this.current.get(branch) !== index) this.prefetch(this.current.set(branch, index));
    return (await running)[name].data;
  }
  /** What the probe graph gives for a call: step reuse looks at it. */
  async modulated(t, branch, inputs, ahead) {
    const { bins, precisions, reuse } = this.schedule, index = this.schedule.select(t, branch, precisions[0]);
    const { expert } = bins[index].when;
    const { graph, coefficients } = reuse.probes.find((one) => ["", expert].includes(one.expert));
    const session = await this.session(graph);
    const results = await session.run(await ahead.feeds(index, branch, session, inputs));
    return { expert, coefficients, value: results[session.outputNames[0]].data };
  }
  /** Load what the calls after those of `current` may need, and let go of the rest. */
  prefetch(current) {
    const bins = [...current].flatMap(([branch, index]) => [index, ...this.schedule.upcoming(index, branch)]);
    const { soon, seldom } = graphsFor(this.schedule, bins);
    this.release([...this.sessions.keys()].filter((graph) => ![...soon, ...seldom].includes(graph)));
    for (const graph of soon) this.session(graph).catch(() => {}); // told when it is needed
  }
  /** The session of a graph, loaded once; one that failed is tried again. */
  session(graph) {
    if (!this.sessions.has(graph)) {
      this.sessions.set(graph, this.load(graph));
      this.sessions.get(graph).catch(() => this.sessions.delete(graph) && this.stores.clear());
    }
    return this.sessions.get(graph);
  }
  async load(graph) {
    const folder = graph.slice(0, graph.lastIndexOf("/") + 1);
    const stores = this.manifest.files.filter(({ path }) => path.startsWith(folder) && path.endsWith(".bin"));
    const externalData = await Promise.all(stores.map(async ({ path }) => {
      if (!this.stores.has(path)) this.stores.set(path, this.read(path));
      return { path: path.slice(folder.length), data: new Uint8Array(await this.stores.get(path)) };
    }));
    const options = { externalData, ...settings(this.schedule, graph, this.manifest.session) };
    return this.ort.InferenceSession.create(new Uint8Array(await this.read(graph)), options);
  }
  async release(graphs) {
    const loading = graphs.map((graph) => this.sessions.get(graph));
    for (const graph of graphs) this.sessions.delete(graph);
    await Promise.all(loading.map((one) => one.then((session) => session.release(), () => {})));
  }
  close = () => this.release([...this.sessions.keys()]);
}
