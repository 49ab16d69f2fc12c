"""The embedded sample: its sampler, its judge, and that digits-hard is digits with outliers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vdq_export.errors import ModelError, UnknownNameError
from vdq_export.model import Model, Step, Trajectory, first_tensor
from vdq_export.samples import digits
from vdq_export.samples.digits import data
from vdq_export.samples.digits.judge import DigitsJudge, velocities
from vdq_export.samples.digits.sampler import CALIBRATION, DigitsSampler, case_condition, case_noise

NOISE_OF_CASE_0 = [-0.793122, 0.240571]


@pytest.fixture(scope="module")
def sample() -> Model:
    return digits.load(calibration_cases=1)


@pytest.fixture(scope="module")
def hard() -> Model:
    return digits.load("digits-hard", calibration_cases=1)


@pytest.fixture(scope="module")
def trajectory(sample: Model) -> Trajectory:
    return next(iter(sample.iter_trajectories()))


def fake_glyph(seed: int) -> np.ndarray:
    """[8, 8] a blot in [0, 1]; the motion of any shape can be measured."""
    return np.random.default_rng(seed).random((8, 8)).astype(np.float32)


class Still:
    """A denoiser that predicts a constant velocity and notes what it was called with."""

    def __init__(self, output: float = 0.0) -> None:
        self.output, self.branch = output, ""
        self.calls: list[tuple[str, dict[str, torch.Tensor]]] = []

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        self.branch = name
        yield
        self.branch = ""

    def __call__(self, **inputs: torch.Tensor) -> tuple[torch.Tensor]:
        self.calls.append((self.branch, inputs))
        return (torch.full_like(inputs["hidden_states"], self.output),)


def test_schedule_is_the_shifted_one() -> None:
    sigmas = DigitsSampler(steps=4, shift=2.0).sigmas
    assert sigmas == pytest.approx([1, 6 / 7, 2 / 3, 0.4, 0], abs=1e-12)  # 2s/(1+s) of 1, 3/4, 1/2, 1/4, 0


def test_sampler_calls_both_branches_with_static_shapes(sample: Model) -> None:
    denoiser, seen = Still(), list[Step]()
    DigitsSampler().generate(denoiser, 5, seen.append)
    assert [branch for branch, _ in denoiser.calls] == ["cond", "uncond"] * 20 == [step["branch"] for step in seen]
    for step, (_, inputs) in zip(seen, denoiser.calls, strict=True):
        assert step["t"] == float(inputs["timestep"])
        assert inputs.keys() == sample.example_inputs.keys()
        for name, example in sample.example_inputs.items():
            assert (inputs[name].shape, inputs[name].dtype) == (example.shape, example.dtype)
    assert seen[0]["t"] == 1000 and seen[-1]["t"] == pytest.approx(1000 * 0.1 / 1.05)
    assert torch.equal(denoiser.calls[0][1]["encoder_hidden_states"][0], data.embed(case_condition(5).text))
    assert torch.equal(denoiser.calls[1][1]["encoder_hidden_states"][0], data.embed(None))


def test_euler_integrates_a_constant_velocity_exactly() -> None:
    # x(0) = x(1) - v; noise of case 3 less 0.7, mapped from [-1, 1] to [0, 1]
    clip = DigitsSampler().generate(Still(0.7), 3)
    expected = ((case_noise(3)[0] - 0.7) / 2 + 0.5).clamp(0, 1).numpy()
    assert np.abs(clip - expected).max() < 1e-5
    assert clip.shape == (1, 8, 16, 16)


def test_guidance_weighs_the_branches() -> None:
    class Branches(Still):
        def __call__(self, **inputs: torch.Tensor) -> tuple[torch.Tensor]:
            self.output = 0.2 if self.branch == "cond" else 0.1
            return super().__call__(**inputs)

    guided = DigitsSampler(guidance=3.0).generate(Branches(), 0)  # 0.1 + 3 * 0.1
    assert np.abs(guided - DigitsSampler().generate(Still(0.4), 0)).max() < 1e-5


def test_cases_are_spread_distinct_and_split() -> None:
    assert {case_condition(case) for case in range(80)} == set(data.all_conditions())
    assert len({case_condition(case).digit for case in range(8)}) >= 6
    assert {case_condition(case).direction for case in range(8)} == set(data.DIRECTIONS)
    assert not torch.equal(case_noise(0), case_noise(CALIBRATION))
    # PCG64 is the same on every machine; this pins the mapping from case to seed
    assert case_noise(0)[0, 0, 0, 0, :2].tolist() == pytest.approx(NOISE_OF_CASE_0, abs=1e-6)
    with pytest.raises(ValueError, match="case -1"):
        case_condition(-1)


def test_batches_equal_single_cases(sample: Model) -> None:
    sampler = DigitsSampler(steps=2)
    together = sampler.generate_many(sample.module, [0, 1, 2], 2)
    for case, clip in enumerate(together):
        # summation order differs with the batch: a few float32 roundings
        assert np.abs(clip - sampler.generate(sample.module, case)).max() < 1e-4


def test_trajectories_can_be_read_twice(sample: Model, trajectory: Trajectory) -> None:
    again = next(iter(sample.iter_trajectories()))
    assert len(trajectory) == 40
    for a, b in zip(trajectory, again, strict=True):
        assert (a["t"], a["branch"]) == (b["t"], b["branch"])
        assert all(torch.equal(a["inputs"][name], b["inputs"][name]) for name in a["inputs"])


@pytest.mark.parametrize("direction", data.DIRECTIONS)
@pytest.mark.parametrize("speed", data.SPEEDS)
def test_judge_measures_motion(direction: str, speed: str) -> None:
    rng = np.random.default_rng(1)
    for digit in range(10):
        condition = data.Condition(digit, direction, speed)
        clip = data.random_clip(fake_glyph(digit), condition, rng) / 2 + 0.5
        case = next(case for case in range(80) if case_condition(case) == condition)
        verdicts = DigitsJudge().verdicts([clip], [case])
        assert verdicts["direction"][0] and verdicts["speed"][0] and verdicts["motion"][0]
        wrong = next(
            c for c in range(80) if case_condition(c).direction != direction and case_condition(c).speed != speed
        )
        verdicts = DigitsJudge().verdicts([clip], [wrong])
        assert not (verdicts["direction"][0] or verdicts["speed"][0] or verdicts["motion"][0])


def test_velocity_is_in_pixels_a_frame() -> None:
    clip = data.render(fake_glyph(0), 1.0, 7.5, "left", "slow") / 2 + 0.5
    # the bilinear half-pixel frames lose a little of their dim pixels to the judge's floor
    assert velocities(clip)[0] == pytest.approx([0, -0.5], abs=0.03)


def test_judge_reads_digits() -> None:
    pytest.importorskip("sklearn")
    from vdq_export.samples.digits import train_judge

    images, labels = data.load_glyphs()
    training, held_out = train_judge.split_glyphs()
    assert not set(training) & set(held_out)
    clips, motion = train_judge.render_clips(images, labels, held_out, np.random.default_rng(0))
    read = DigitsJudge().digits(clips)
    assert (read == labels[held_out]).mean() >= 0.97
    assert (np.abs(velocities(clips) - motion).max(1) < 0.25).mean() >= 0.99
    assert (DigitsJudge().digits(np.roll(clips[..., ::-1, :], 3)) == labels[held_out]).mean() < 0.7  # upside down


def test_judge_fails_empty_and_noisy_clips() -> None:
    cases = list(range(80))
    empty = DigitsJudge()([np.zeros((1, 8, 16, 16))] * 80, cases)
    noise = DigitsJudge()(list(np.random.default_rng(0).random((80, 1, 8, 16, 16))), cases)
    for scores in (empty, noise):
        assert scores["digit"] <= 0.3 and scores["motion"] == 0
    with pytest.raises(ValueError, match="1 clips for 2 cases"):
        DigitsJudge()([np.zeros((1, 8, 16, 16))], [0, 1])


def test_trained_model_makes_what_it_is_asked_for(sample: Model) -> None:
    assert sample.judge is not None
    clips = DigitsSampler().generate_many(sample.module, range(8), 8)
    scores = sample.judge(clips, range(8))
    assert scores["digit"] >= 0.75 and scores["motion"] >= 0.75  # the log has the score over 200 cases


def largest_difference(a: Model, b: Model, steps: Trajectory) -> float:
    """Of two models' outputs, in standard deviations of the first one's."""
    outputs = [(a(**step["inputs"]), b(**step["inputs"])) for step in steps]
    return max(float((x - y).abs().max() / x.std()) for x, y in outputs)


def test_hard_computes_the_same(sample: Model, hard: Model, trajectory: Trajectory) -> None:
    assert largest_difference(sample, hard, trajectory) < 1e-4


@pytest.mark.parametrize(
    "name", ["condition_embedder.time_proj.bias", "blocks.3.norm2.weight", "blocks.2.attn1.to_v.bias"]
)
def test_a_slip_in_the_reparametrisation_would_be_seen(
    sample: Model, hard: Model, trajectory: Trajectory, name: str
) -> None:
    parameter = hard.module.get_parameter(name)
    kept = parameter.detach().clone()
    try:
        parameter.data[..., 0] *= 1.1  # one channel (of the last axis) scaled and not compensated
        parameter.data[..., 0] += 0.01
        assert largest_difference(sample, hard, trajectory[::8]) > 2e-4
    finally:
        parameter.data.copy_(kept)


def test_hard_has_outlier_channels_and_the_base_has_not(sample: Model, hard: Model, trajectory: Trajectory) -> None:
    attention = [f"{a}.{n}" for a in ("attn1", "attn2") for n in ("to_q", "to_k", "to_v", "to_out.0")]
    base, outliers = channel_ratios(sample, trajectory), channel_ratios(hard, trajectory)
    for name in [*attention, "ffn.net.0.proj", "ffn.net.2"]:
        assert sum(outliers[f"blocks.{index}.{name}"] >= 30 for index in range(6)) >= 5, name
        assert max(base[f"blocks.{index}.{name}"] for index in range(6)) < 12, name


def channel_ratios(model: Model, trajectory: Trajectory) -> dict[str, float]:
    """{linear: largest over median of the input channels' ranges} over every fourth call of a trajectory."""
    peaks: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            peak = inputs[0].flatten(0, -2).abs().amax(0)
            peaks[name] = torch.maximum(peaks.get(name, peak), peak)

        return hook

    linears = [(n, m) for n, m in model.module.named_modules() if isinstance(m, torch.nn.Linear)]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears]
    for step in trajectory[::4]:
        model(**step["inputs"])
    for handle in handles:
        handle.remove()
    return {name: float(peak.max() / peak.median()) for name, peak in peaks.items()}


def test_hard_is_deterministic_and_leaves_the_base_alone(sample: Model, hard: Model) -> None:
    before = sample.weight_hash()
    again = digits.hard.harden(sample.module)
    assert sample.weight_hash() == before
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), hard.module.parameters(), strict=True))
    assert hard.weight_hash() != before


def test_bad_names_and_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean digits"):
        digits.load("digit")
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="refused"):
        digits.load(weights=tmp_path / "weights.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    with pytest.raises(ModelError, match="damaged"):
        digits.load(weights=tmp_path / "cut.safetensors")
    with pytest.raises(ModelError, match="absent"):
        digits.load(weights=tmp_path / "absent.safetensors")


def test_output_is_the_first_tensor(sample: Model) -> None:
    assert first_tensor(sample(**sample.example_inputs)).shape == (1, 1, 8, 16, 16)
