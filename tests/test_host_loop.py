"""The host loop in JavaScript makes the Python runtime's clips, under Node and in a browser.

Where the same kernels run, clips are equal to the last bit. Other kernels (WebAssembly's; this machine's on weights
that are not packed for them) round float sums otherwise, in the last bit. Where activations have 8 bits, one such bit
tips a value over the edge of a quantization step, the next layers see a change a thousand times larger, and so on:
Python's own clips with and without packed weights are then up to a few hundredths apart. It is no saturation; 7-bit
weights and exact arithmetic do the same. With 16-bit activations a step is 256 times smaller, and all of this with it:
there the browser's clip is Python's within 1e-3. The bundle here has both, 8 bits in low and 16 in high precision.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from safetensors.numpy import save

from tests import hoisted_bundle, policy_cases
from tests.host_cases import (
    CHROMIUM,
    HOST,
    LOOP,
    MODULES,
    Array,
    generate,
    hoisted_case,
    made_once,
    needs_chromium,
    needs_modules,
    needs_node,
    node,
    with_policy,
    with_schedule,
)
from vdq_export import recipe as recipes
from vdq_export.bundle import Bundle
from vdq_export.compiler import export
from vdq_export.errors import ModelError
from vdq_export.host import case
from vdq_export.plan import Branch
from vdq_export.runtime import load
from vdq_export.runtime.engine import Engine
from vdq_export.samples import digits
from vdq_export.samples.digits.sampler import DigitsSampler
from vdq_export.schedule import Schedule

DELTA = "delta=0.12,end=high"
EQUAL = 1e-3  # of pixels in [0, 1]; under Node it is 0, as long as both onnxruntimes have the same kernels
PACKED = {"session.disable_prepacking": "0"}  # with sessions that share weights Python's runtime does without


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sample:digits in 4 bins of two precisions. Exported from one calibration clip, by one of the test processes."""

    def make(out: Path) -> None:
        base = recipes.load("static-minmax")
        two = msgspec.structs.replace(base, schedule=recipes.ScheduleRecipe(delta=0.12, high=16))
        model = digits.load("digits", calibration_cases=1)
        model.name = "sample:digits"
        export(model, recipe=two, tsw=4, out=out, isa="generic", workers=1)

    base = tmp_path_factory.getbasetemp()
    return made_once((base.parent if base.name.startswith("popen-") else base) / "host-digits", make)


def python_clip(
    path: Path, number: int, monkeypatch: pytest.MonkeyPatch, options: dict[str, str] | None = None
) -> tuple[Array, list[str | None]]:
    """(clip of the Python runtime, precision of each step)."""
    chosen: list[str | None] = []
    with monkeypatch.context() as patch, load(path, threads=1, session_options=options) as transformer:
        patch.setattr(Engine, "count_step", lambda _, precision: chosen.append(precision))
        return DigitsSampler().generate(transformer, number), chosen


@needs_modules
@pytest.mark.parametrize("policy", ["static:low", DELTA])
def test_node_makes_pythons_clip(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    path = with_policy(bundle, policy, tmp_path / "bundle")
    opened = Bundle.open(path)
    made = generate(path, case.make(opened, DigitsSampler(), 5), tmp_path)
    expected, chosen = python_clip(path, 5, monkeypatch, PACKED)
    assert made.clip.shape == expected.shape
    np.testing.assert_allclose(made.clip, expected, rtol=0, atol=EQUAL)
    assert [step["precision"] for step in made.steps] == chosen
    assert set(chosen) == ({"low"} if policy == "static:low" else {"low", "high"})
    for step in made.steps:
        bins = [opened.schedule.select(step["t"], b, precision=step["precision"]) for b in ("cond", "uncond")]
        assert step["bins"] == bins
    assert len({index for step in made.steps for index in step["bins"]}) >= 4, "it went through all bins"
    other, _ = python_clip(path, 6, monkeypatch, PACKED)
    assert np.abs(made.clip - other).max() > 100 * EQUAL, "another clip would be noticed"


@contextmanager
def serving(path: Path, cwd: Path) -> Iterator[str]:
    """The address of `vdq-export serve-demo`."""
    command = [sys.executable, "-m", "vdq_export.cli", "serve-demo", str(path), "--no-open", "--runtime"]
    runtime = str(MODULES / "onnxruntime-web" / "dist")
    with subprocess.Popen([*command, runtime], stdout=subprocess.PIPE, text=True, cwd=cwd) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().split()[0]
        finally:
            server.terminate()


# Twenty seconds of WebAssembly on two cores: that this runs in a browser is what the host loop is for.
@needs_chromium
def test_chromium_makes_pythons_clip(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = with_policy(bundle, "static:high", tmp_path / "bundle")
    expected, _ = python_clip(path, 5, monkeypatch)
    with serving(path, tmp_path) as address:
        urls = (f"{address}?number=5", f"{address}?number=99999999999")
        done = node(HOST / "browser.mjs", CHROMIUM, tmp_path / "seen.json", *urls)
    assert (done.returncode, done.stderr) == (0, "")
    seen, refused = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    assert refused["state"] == "error" and "number must be a whole number" in refused["text"]
    assert (seen["state"], seen["complaints"]) == ("done", []), seen["text"]
    assert {url.split("/")[2] for url in seen["requests"]} == {address.split("/")[2]}, "nothing from elsewhere"
    assert seen["isolated"], "else there are no threads"
    made = np.array(seen["made"]["clip"], np.float32).reshape(seen["made"]["shape"])
    np.testing.assert_allclose(made, expected, rtol=0, atol=EQUAL)
    steps, schedule = seen["made"]["steps"], Bundle.open(path).schedule
    assert [step["bins"] for step in steps] == [[schedule.select(s["t"], "cond", precision="high")] * 2 for s in steps]
    assert (seen["rows"], len(steps)) == (20, 20) and all(step["milliseconds"] > 0 for step in steps)
    drawn = np.array(seen["drawn"], np.float32).reshape(8, 16, 16) / 255
    np.testing.assert_allclose(drawn, made[0], rtol=0, atol=1 / 255)
    assert all(told in seen["text"] for told in (DigitsSampler().describe(5), "20 of 20", "WebAssembly", "7 (high)"))


def thousandfold(schedule: Schedule) -> Schedule:
    """For timesteps up to 1000, as flow-euler has them, in place of 1."""
    bins = [
        msgspec.structs.replace(
            one,
            when=msgspec.structs.replace(one.when, t=(1000 * one.when.t[0], 1000 * one.when.t[1])),
            steps=tuple(1000 * t for t in one.steps),
        )
        for one in schedule.bins
    ]
    return msgspec.structs.replace(schedule, bins=tuple(bins))


@needs_modules
@pytest.mark.parametrize("policy", ["delta=0.3", "cache=0.1", "delta=0.25,end=high+cache=0.1", "pattern=abs,share=0.4"])
def test_policies_with_graphs_for_each_branch_and_a_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    sampler = {"name": "flow-euler", "steps": 10, "shift": 1.0, "guidance": 1.5}
    made = policy_cases.write(tmp_path / "unit", policy_cases.Kind(branches=("cond", "uncond")), sampler=sampler)
    path = with_schedule(made.path, thousandfold(made.schedule).with_policy(policy), tmp_path / "bundle")
    x, context = policy_cases.start()
    contexts: dict[Branch, Array] = {"cond": context, "uncond": 0 * context}
    tensors = {"latent": x, **{f"{branch}/encoder_hidden_states": value for branch, value in contexts.items()}}
    found = generate(path, save(tensors, {"latent": "hidden_states", "branches": "cond uncond"}), tmp_path)

    chosen: list[str | None] = []
    levels = DigitsSampler(steps=10, shift=1.0).sigmas
    with monkeypatch.context() as patch, load(path, threads=1, session_options=PACKED) as transformer:
        patch.setattr(Engine, "count_step", lambda _, precision: chosen.append(precision))
        for level, following in pairwise(levels):
            t = float(np.float32(1000 * level))
            c, u = (policy_cases.network(transformer, x, t, value, branch) for branch, value in contexts.items())
            x = x + np.float32(following - level) * (u + np.float32(1.5) * (c - u))
    assert [step["precision"] for step in found.steps] == chosen
    assert len(set(chosen)) > 1, "the policy changes its mind"
    np.testing.assert_allclose(found.clip, np.clip(x[0] / 2 + np.float32(0.5), 0, 1), rtol=0, atol=EQUAL)
    for step in found.steps:
        assert len(step["bins"]) == (0 if step["precision"] is None else 2)


def prompts(seed: int = 0) -> dict[str, dict[str, Array]]:
    """Of both guidance branches, for bundles in parts."""
    made = [hoisted_bundle.inputs(seed=100 + seed + place) for place in range(2)]
    return {
        branch: {name: one[name] for name in ("encoder_hidden_states", "mask")}
        for branch, one in zip(("cond", "uncond"), made, strict=True)
    }


def euler_clip(path: Path, start: Array, given: Mapping[str, Mapping[str, Any]]) -> Array:
    """What Python's runtime and flow-euler with guidance 2 make of it."""
    x, steps = start, hoisted_bundle.STEPS
    with load(path, threads=1, session_options=PACKED) as transformer:
        for t, following in pairwise((*steps, 0.0)):
            calls = []
            for branch, inputs in given.items():
                with transformer.cache_context(branch):
                    calls.append(transformer(hidden_states=x, timestep=t, **inputs).sample)
            c, u = calls
            x = x + np.float32((following - t) / 1000) * (u + np.float32(2) * (c - u))
    clip: Array = np.clip(x[0] / 2 + np.float32(0.5), 0, 1)
    return clip


@needs_modules
@pytest.mark.parametrize(
    ("step", "tables", "runs"),
    [
        (True, True, {"prompt": 4, "step": 0, "mixed": 16, "rows": 16}),  # each of two experts, of both branches
        (False, True, {"prompt": 4, "step": 0, "mixed": 16, "rows": 16}),
        (True, False, {"prompt": 4, "step": 16, "mixed": 16, "rows": 0}),
    ],
)
def test_node_runs_what_left_the_bins_graphs(tmp_path: Path, step: bool, tables: bool, runs: dict[str, int]) -> None:
    kind = hoisted_bundle.Kind(step=step, tables=tables, branches=("cond", "uncond"))
    made = hoisted_bundle.write(tmp_path / "bundle", kind)
    start = hoisted_bundle.inputs()["hidden_states"] / 8
    found = generate(made.path, hoisted_case(start, prompts()), tmp_path)
    np.testing.assert_array_equal(found.clip, euler_clip(made.path, start, prompts()))
    assert found.runs == runs
    assert [one["bins"] for one in found.steps] == [[n, n + 4] for n in (0, 0, 0, 1, 1, 2, 2, 3)]
    whole = hoisted_bundle.write(tmp_path / "whole", kind._replace(hoist=False)).path
    np.testing.assert_allclose(found.clip, euler_clip(whole, start, prompts()), rtol=0, atol=1e-5)
    other = prompts(5) | {"uncond": prompts()["uncond"]}
    again = generate(made.path, hoisted_case(start, other), tmp_path)
    assert np.abs(again.clip - found.clip).max() > 0.01, "the prompt is seen"


@needs_modules
def test_node_gives_probes_what_was_computed_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = hoisted_bundle.write(tmp_path / "unit", hoisted_bundle.Kind(with_probe=True))
    path = with_policy(made.path, "cache=2", tmp_path / "bundle")
    start, chosen = hoisted_bundle.inputs()["hidden_states"] / 8, list[str | None]()
    found = generate(path, hoisted_case(start, prompts()), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "count_step", lambda _, precision: chosen.append(precision))
        np.testing.assert_array_equal(found.clip, euler_clip(path, start, prompts()))
    assert [one["precision"] for one in found.steps] == chosen
    assert {None, ""} == set(chosen)


@needs_modules
def test_what_it_cannot_do_it_refuses(tmp_path: Path) -> None:
    kind = hoisted_bundle.Kind(step=False, rows=hoisted_bundle.STEPS[:-1])
    made = hoisted_bundle.write(tmp_path / "short", kind, uncalibrated="refuse")
    start, given = hoisted_bundle.inputs()["hidden_states"], prompts()
    without = {branch: {"mask": one["mask"]} for branch, one in given.items()}
    for name, asked, message in (
        ("timestep", given, "timestep 125 has no row in the tables"),
        ("input", without, "no value for input encoder_hidden_states at timestep 1000"),
    ):
        (tmp_path / name).write_bytes(hoisted_case(start, asked))
        done = node(LOOP / "node.mjs", made.path, tmp_path / name, tmp_path / "out")
        assert done.returncode == 1 and message in done.stderr
    nearest = with_schedule(
        made.path, msgspec.structs.replace(made.schedule, uncalibrated="nearest"), tmp_path / "near"
    )
    done = node(LOOP / "node.mjs", nearest, tmp_path / "timestep", tmp_path / "out")
    assert done.returncode == 0 and done.stderr.count("timestep 125 has no row in the tables; using the nearest") == 1
    (tmp_path / "out").unlink()
    graph = made.graph_path(0)
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    done = node(LOOP / "node.mjs", made.path, tmp_path / "timestep", tmp_path / "out")
    assert done.returncode == 1 and "graphs/body.bin00.onnx is damaged" in done.stderr
    assert not (tmp_path / "out").exists()


@needs_node
def test_the_next_bins_graph_is_loaded_ahead_and_the_last_ones_let_go(bundle: Path, tmp_path: Path) -> None:
    path = with_policy(bundle, "static:low", tmp_path / "bundle")
    opened = Bundle.open(path)
    (tmp_path / "case").write_bytes(case.make(opened, DigitsSampler(), 0))
    (tmp_path / "graphs.json").write_text(json.dumps(described(opened)), encoding="utf-8")
    arguments = (tmp_path / "case", tmp_path / "graphs.json", tmp_path / "events.json")
    done = node(HOST / "sessions.mjs", path, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads((tmp_path / "events.json").read_text(encoding="utf-8"))
    events = told["events"]
    order = [f"graphs/body.bin{index:02d}.onnx" for index in range(4)]
    ahead = set(opened.schedule.hoisted[0].graphs) - {opened.schedule.hoisted[0].step}
    loads = [name for what, name, *_ in events if what == "load" and name not in ahead]
    assert loads == [*order, order[0]], "the first again, for another clip"
    assert [name for what, name, *_ in events if what == "load" and name in ahead] == sorted(ahead), "once, and no step"
    assert [name for what, name, *_ in events if what == "run" and name.endswith("prompt.onnx")] == [
        "graphs/prompt.onnx"
    ] * 2
    alive: set[str] = set()
    runs = {name: [i for i, event in enumerate(events) if event[:2] == ["run", name]] for name in order}
    for i, (what, name, *rest) in enumerate(events):
        alive = alive | {name} if what == "load" else alive - {name} if what == "release" else alive
        assert len(alive - ahead) <= 3  # the new one may be there before the old one has gone
        if what == "load":
            assert rest == [[["weights/weights.bin", (path / "graphs" / "weights" / "weights.bin").stat().st_size]]]
            place = order.index(name) if name in order else 0
            if place > 0:
                before = runs[order[place - 1]]
                assert before[0] < i < before[-1], "while the bin before runs"
    assert alive == set()
    assert told["opened"].count("graphs/weights/weights.bin") == 1


def described(bundle: Bundle) -> dict[str, Any]:
    """Inputs and shapes of outputs of its graphs, by path."""
    found = {}
    for path in bundle.schedule.graphs:
        graph = onnx.load(bundle.path / path, load_external_data=False).graph
        outputs = {one.name: [dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in graph.output}
        found[path] = {"inputs": [one.name for one in graph.input], "outputs": outputs}
    return found


def test_a_case_is_what_the_sampler_begins_with(bundle: Path) -> None:
    from safetensors.numpy import load as read

    opened = Bundle.open(bundle)
    tensors = read(case.make(opened, DigitsSampler(), 5))
    assert {name: value.shape for name, value in tensors.items()} == {
        "latent": (1, 1, 8, 16, 16),
        "cond/encoder_hidden_states": (1, 8, 64),
        "uncond/encoder_hidden_states": (1, 8, 64),
    }
    steps: list[Any] = []
    DigitsSampler().generate(lambda **inputs: (inputs["hidden_states"],), 5, steps.append)
    np.testing.assert_array_equal(tensors["latent"], steps[0]["inputs"]["hidden_states"])
    for branch, step in zip(("cond", "uncond"), steps, strict=False):
        np.testing.assert_array_equal(
            tensors[f"{branch}/encoder_hidden_states"], step["inputs"]["encoder_hidden_states"]
        )


def test_bundles_of_other_samplers_are_refused(tmp_path: Path) -> None:
    from tests import tiny_bundle

    with pytest.raises(ModelError, match=r"sampler 'euler', and the host loop carries out flow-euler only"):
        case.check(tiny_bundle.write(tmp_path / "bundle"))
    made = hoisted_bundle.write(tmp_path / "parts")
    case.check(made)
    with pytest.raises(ModelError, match=r"the sampler calls with hidden_states \[1, 1, 8, 16, 16\], the graphs take"):
        case.make(made, DigitsSampler(), 0)
