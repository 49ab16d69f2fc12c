"""The drop-in transformer: right graph, right samples, weights once, next graph in time."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vdq_export
from tests.tiny_bundle import expected, write
from vdq_export.errors import BundleError, ScheduleError
from vdq_export.runtime import load
from vdq_export.runtime.session import SessionPool
from vdq_export.runtime.transformer import Transformer

TOLERANCE = {"rtol": 1e-4, "atol": 1e-3}  # float32 sums over 64 products, times gains up to 128


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write(tmp_path / "out").path


@pytest.fixture(params=[True, False], ids=["shared", "each"])
def transformer(out: Path, request: pytest.FixtureRequest) -> Iterator[Transformer]:
    """Bins on one session, and each on its own."""
    with load(out, threads=1, share=request.param) as made:
        yield made


def inputs(batch: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 4, 64)
    return {
        "hidden_states": torch.randn(shape, generator=generator),
        "encoder_hidden_states": torch.randn(shape, generator=generator),
    }


def check(result: Any, given: dict[str, torch.Tensor], t: list[float], indices: list[int]) -> None:
    x, context = (given[name].float().numpy() for name in ("hidden_states", "encoder_hidden_states"))
    wanted = expected(x, np.array(t, np.float32), context, indices)
    np.testing.assert_allclose(np.asarray(result), wanted, **TOLERANCE)


# -- drop-in ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "index"), [(1000.0, 0), (800.0, 0), (749.0, 1), (250.0, 2), (0.0, 3)])
def test_the_timestep_picks_the_graph(transformer: Transformer, t: float, index: int) -> None:
    x = inputs()
    check(transformer(**x, timestep=torch.tensor([t])).sample, x, [t], [index])


def test_as_diffusers_calls_it(transformer: Transformer) -> None:
    x = inputs()
    with transformer.cache_context("cond", step_index=0, sigma=1.0):  # as diffusers 0.42 calls it
        (result,) = transformer(
            hidden_states=x["hidden_states"],
            timestep=torch.tensor(900),
            encoder_hidden_states=x["encoder_hidden_states"],
            encoder_hidden_states_image=None,
            attention_kwargs=None,
            return_dict=False,
        )
    assert isinstance(result, torch.Tensor)
    check(result, x, [900], [0])
    assert transformer.config.patch_size == [1, 2, 2] and transformer.config["in_channels"] == 4
    assert not hasattr(transformer.config, "image_dim")
    assert transformer.dtype is torch.float32 and transformer.device == torch.device("cpu")
    assert transformer.to("cpu", torch.float16).eval() is transformer


def test_output_has_sample_and_index(transformer: Transformer) -> None:
    output = transformer(**inputs(), timestep=500.0)
    assert output.sample is output[0]


def test_positional_inputs_follow_the_signature(transformer: Transformer) -> None:
    x = inputs()
    check(transformer(x["hidden_states"], 900.0, x["encoder_hidden_states"])[0], x, [900], [0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_follows_the_input_dtype(transformer: Transformer, dtype: torch.dtype) -> None:
    x = {name: value.to(dtype) for name, value in inputs().items()}
    result = transformer(**x, timestep=torch.tensor([900.0])).sample
    assert result.dtype is dtype
    reference = transformer(**{n: v.float() for n, v in x.items()}, timestep=900.0).sample
    torch.testing.assert_close(result, reference.to(dtype))


def test_numpy_in_numpy_out(transformer: Transformer) -> None:
    x = inputs()
    result = transformer(**{name: value.numpy() for name, value in x.items()}, timestep=900.0).sample
    assert isinstance(result, np.ndarray)
    check(result, x, [900], [0])


def test_it_stands_in_a_diffusers_pipeline(transformer: Transformer) -> None:
    """DiffusionPipeline asks its components for more than a call: registering and moving must pass."""
    diffusers = pytest.importorskip("diffusers")

    class Pipeline(diffusers.DiffusionPipeline):  # type: ignore[misc,name-defined]
        def __init__(self, transformer: Any) -> None:
            super().__init__()
            self.register_modules(transformer=transformer)

    pipe = Pipeline(torch.nn.Linear(1, 1))
    pipe.transformer = transformer
    assert pipe.to("cpu").transformer is transformer


def test_inputs_are_checked_by_name_and_shape(transformer: Transformer) -> None:
    x = inputs()
    with pytest.raises(BundleError, match="'encoder_hidden_states' is missing"):
        transformer(hidden_states=x["hidden_states"], timestep=1.0)
    with pytest.raises(BundleError, match="no input 'image'"):
        transformer(**x, timestep=1.0, image=np.zeros(2))
    with pytest.raises(BundleError, match="'hidden_states' was given twice"):
        transformer(x["hidden_states"], **x, timestep=1.0)
    with pytest.raises(BundleError, match=r"'hidden_states' is \[1, 5, 64\], the graphs take \[1, 4, 64\]"):
        transformer(**{**x, "hidden_states": torch.zeros(1, 5, 64)}, timestep=1.0)
    with pytest.raises(BundleError, match=r"'encoder_hidden_states' is \[3, 4, 64\]"):
        transformer(**{**x, "encoder_hidden_states": torch.zeros(3, 4, 64)}, timestep=1.0)
    with pytest.raises(BundleError, match=r"'timestep' is \[3\]"):
        transformer(**x, timestep=torch.zeros(3))
    with pytest.raises(BundleError, match="empty batch"):
        transformer(**inputs(0), timestep=torch.zeros(0))


# -- batches ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), group=st.sampled_from([1, 3]))
def test_any_batch_on_any_static_batch(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, group: int
) -> None:
    place = tmp_path_factory.getbasetemp() / f"group{group}"
    if not place.exists():
        write(place, group=group)
    t = data.draw(st.lists(st.sampled_from([990.0, 760.0, 740.0, 400.0, 10.0]), min_size=1, max_size=7))
    x = inputs(len(t), seed=len(t))
    with load(place, threads=1, prefetch=False) as transformer:
        result = transformer(**x, timestep=torch.tensor(t)).sample
    check(result, x, t, [3 - min(3, int(one // 250)) for one in t])


def test_one_timestep_serves_the_whole_batch(transformer: Transformer) -> None:
    x = inputs(3)
    for t in (600.0, torch.tensor(600), torch.tensor([600.0])):
        check(transformer(**x, timestep=t).sample, x, [600] * 3, [1] * 3)


# -- branches and schedule -------------------------------------------------------------------------------------------


def test_guidance_branches_have_their_own_graphs(tmp_path: Path) -> None:
    x = inputs()
    with load(write(tmp_path / "out", branches=("cond", "uncond")).path, threads=1) as transformer:
        with transformer.cache_context("cond"):
            check(transformer(**x, timestep=600.0).sample, x, [600], [1])
            with transformer.cache_context("uncond"):
                check(transformer(**x, timestep=600.0).sample, x, [600], [5])
            check(transformer(**x, timestep=600.0).sample, x, [600], [1])  # the outer branch is back
        with pytest.raises(ScheduleError, match="cache_context"):
            transformer(**x, timestep=600.0)


def test_uncalibrated_timesteps(out: Path, transformer: Transformer) -> None:
    x = inputs()
    with pytest.warns(UserWarning, match="1100 was not calibrated"):
        check(transformer(**x, timestep=1100.0).sample, x, [1100], [0])
    with load(out, uncalibrated="refuse") as strict, pytest.raises(ScheduleError, match="was not calibrated"):
        strict(**x, timestep=1100.0)


# -- sessions --------------------------------------------------------------------------------------------------------


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_next_graph_is_loaded_ahead_and_the_last_one_dropped(out: Path) -> None:
    x = inputs()
    seen = []
    with load(out, threads=1, share=False) as transformer:
        for t in (900.0, 800.0, 700.0, 300.0, 100.0):
            transformer(**x, timestep=t)
            seen.append(transformer.loaded)
        statistics = transformer.statistics
    assert seen == [[0, 1], [0, 1], [1, 2], [2, 3], [0, 3]]  # after the last bin, the first: the next clip
    assert (statistics.calls, statistics.switches, statistics.loads) == (5, 3, 5)
    assert statistics.stall_seconds >= statistics.longest_stall >= 0


def test_without_prefetch_one_graph_is_held(out: Path) -> None:
    with load(out, threads=1, prefetch=False, share=False) as transformer:
        for t, index in ((900.0, 0), (600.0, 1), (900.0, 0)):
            transformer(**inputs(), timestep=t)
            assert transformer.loaded == [index]


def test_a_prefetched_graph_costs_no_wait() -> None:
    def slow(index: int) -> int:
        time.sleep(0.2)
        return index

    pool = SessionPool(slow)  # type: ignore[arg-type]
    future = pool.prefetch(7)
    wait_for(future.done)
    assert pool.get(7)[1] < 0.1
    session, waited = pool.get(8)
    assert session == 8 and waited >= 0.19  # type: ignore[comparison-overlap]
    pool.close()


def test_a_graph_that_fails_to_load_says_so_and_is_tried_again() -> None:
    failures = [BundleError("disk on fire")]

    def load_once_broken(index: int) -> int:
        if failures:
            raise failures.pop()
        return index

    pool = SessionPool(load_once_broken)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="on fire"):
        pool.get(0)
    assert pool.get(0)[0] == 0
    pool.close()


def test_onnxruntime_errors_name_the_graph(out: Path) -> None:
    with load(out, session_options={"session.intra_op.allow_spinning": "0"}) as fine:
        fine(**inputs(), timestep=900.0)
    with load(out, providers=["NoSuchProvider"]) as transformer, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older onnxruntime warns and falls back to the CPU instead
        try:
            transformer(**inputs(), timestep=900.0)
        except BundleError as error:
            assert "body.bin00.onnx" in str(error)


def test_session_options_of_the_caller_win(out: Path) -> None:
    chosen = {"session.disable_prepacking": "0", "test.key": "x"}
    with load(out, share=False, session_options=chosen) as transformer:
        x = inputs()
        check(transformer(**x, timestep=900.0).sample, x, [900], [0])
        options = transformer._engine._pool.get(0)[0].get_session_options()
    assert options.get_session_config_entry("session.disable_prepacking") == "0"
    assert options.get_session_config_entry("test.key") == "x"


def test_many_threads_at_different_timesteps(transformer: Transformer) -> None:
    cases = [(seed, float(t)) for seed, t in enumerate((990, 10, 600, 400, 990, 300, 700, 100) * 8)]

    def one(case: tuple[int, float]) -> None:
        seed, t = case
        x = inputs(seed=seed)
        check(transformer(**x, timestep=t).sample, x, [t], [3 - min(3, int(t // 250))])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(one, cases))
    assert transformer.statistics.calls == len(cases)


def test_branches_of_threads_do_not_mix(tmp_path: Path) -> None:
    x, barrier = inputs(), threading.Barrier(2)
    with load(write(tmp_path / "out", branches=("cond", "uncond")).path, threads=1) as transformer:

        def one(branch: str, index: int) -> None:
            with transformer.cache_context(branch):
                barrier.wait()
                check(transformer(**x, timestep=600.0).sample, x, [600], [index])

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(one, ("cond", "uncond"), (1, 5)))


def test_close_ends_threads_and_refuses_calls(out: Path) -> None:
    before = threading.active_count()
    transformer = load(out, threads=1)
    transformer(**inputs(), timestep=900.0)
    transformer.close()
    transformer.close()
    assert threading.active_count() == before
    with pytest.raises(BundleError, match="closed"):
        transformer(**inputs(), timestep=900.0)


MEMORY = """
import sys
import numpy as np, psutil
from vdq_export.runtime import load
timesteps = [float(t) for t in sys.argv[2].split(",")]
x = np.ones((1, 4, 2048), np.float32)
options = dict(e.split("=") for e in sys.argv[4:])
with load(sys.argv[1], threads=1, share=sys.argv[3] == "shared", session_options=options) as transformer:
    before = psutil.Process().memory_info().rss
    peak = 0
    for t in timesteps:
        transformer(hidden_states=x, timestep=t, encoder_hidden_states=x)
        while not all(f.done() for f in list(transformer._engine._pool._futures.values())): pass
        peak = max(peak, psutil.Process().memory_info().rss)
    print((peak - before) / 2**20)
"""


def memory(out: Path, timesteps: str, *options: str) -> float:
    """MiB that running at these timesteps adds to a process, the graph loaded ahead included; options[0]: sharing."""
    command = [sys.executable, "-c", MEMORY, str(out), timesteps, *options]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def test_four_bins_need_hardly_more_memory_than_one(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((2048, 2048)).astype(np.float32)  # 16 MiB
    out = write(tmp_path / "four", weight=weight).path
    for sharing in ("shared", "each"):
        one = memory(out, "900", sharing)
        assert one > 15  # the weights are counted
        assert memory(out, "900,600,300,100", sharing) <= 1.15 * one
    # The yardstick sees a copy: with prepacking each session keeps its own.
    assert memory(out, "900,600,300,100", "each", "session.disable_prepacking=0") > 1.5 * one


def test_needs_neither_torch_nor_the_exporter(out: Path) -> None:
    script = f"""
import sys
for name in ("torch", "diffusers", "onnx_graphsurgeon"):
    sys.modules[name] = None  # importing it fails
import numpy as np
import vdq_export
x = np.ones((1, 4, 64), np.float32)
with vdq_export.load({str(out)!r}) as transformer:
    result = transformer(hidden_states=x, timestep=900.0, encoder_hidden_states=x).sample
assert isinstance(result, np.ndarray)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = "import sys, vdq_export; print([m for m in ('torch', 'onnx', 'onnxruntime', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
    assert vdq_export.load is load
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = vdq_export.lode


def test_a_damaged_bundle_does_not_load(out: Path) -> None:
    weights = out / "graphs/weights/weights.bin"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(BundleError, match=r"weights\.bin was changed"):
        load(out)
