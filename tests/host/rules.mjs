// What the host loop decides for the cases of a JSON file: node rules.mjs CASES RESULTS
import { readFile, writeFile } from "node:fs/promises";
import { noiseLevels, Policy, relativeChange, Schedule } from "../../vdq_export/host/loop.mjs";

const silent = () => {};
const attempt = (action) => {
  try {
    return action();
  } catch {
    return "refused";
  }
};

async function clip({ schedule, steps }) {
  const found = [];
  try {
    const policy = new Policy(new Schedule(schedule, silent));
    for (const [number, { t, expert, modulated, output }] of steps.entries()) {
      const { coefficients } = schedule.reuse?.probes[0] ?? {};
      const value = Float32Array.from(modulated);
      const precision = await policy.begin(number, t, async () => ({ expert, coefficients, value }));
      if (precision !== null) policy.observe(Float32Array.from(output));
      found.push(precision);
    }
  } catch {
    found.push("refused");
  }
  return found;
}

const cases = JSON.parse(await readFile(process.argv[2]));
const selections = cases.selections.map(({ schedule, calls }) => {
  const made = new Schedule(schedule, silent);
  return calls.map(({ t, branch, precision }) =>
    attempt(() => {
      const index = made.select(t, branch, precision);
      return [index, made.upcoming(index, branch)];
    }),
  );
});
const clips = [];
for (const one of cases.clips) clips.push(await clip(one));
const levels = cases.samplers.map(noiseLevels);
const changes = cases.pairs.map((pair) => relativeChange(...pair.map((values) => Float32Array.from(values))));
await writeFile(process.argv[3], JSON.stringify({ selections, clips, levels, changes }));
