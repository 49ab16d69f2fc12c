"""Folders of diffusers pipelines and transformers: read, given shapes, denoised and exported by the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import diffusers_folders as folders
from tests.commands import command
from vdq_export import recorded
from vdq_export.bundle import Bundle
from vdq_export.errors import ModelError
from vdq_export.model import Model, first_tensor
from vdq_export.sources import resolve
from vdq_export.sources._scheduling import Scheduler


def trajectories(model: Model) -> list[Any]:
    return [list(one) for one in model.iter_trajectories()]


@pytest.mark.parametrize(("family", "shards"), [("Wan", "40KB"), ("LTX-Video", "10GB")])
def test_a_folder_becomes_a_bundle(family: str, shards: str, tmp_path: Path) -> None:
    """Through the command; `verify` then finds the same shapes and trajectories by the bundle's model name."""
    folders.transformer(family, tmp_path / "model", max_shard_size=shards)
    assert (tmp_path / "model" / "diffusion_pytorch_model.safetensors.index.json").exists() == (shards == "40KB")
    code, out, err = command("model", *folders.sizes(family, steps=2), "--tsw", "2", "--out", "b", cwd=tmp_path)
    assert code == 0, err
    assert "2 bins" in out
    assert "RANDOM text embeddings" in err
    assert "has no scheduler" in err
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.manifest.model.config["frames"] == folders.SMALL[family][0]
    if family == "Wan":
        code, out, err = command("verify", "b", cwd=tmp_path)
        assert code == 0, out + err


def test_two_experts_become_a_bundle(tmp_path: Path) -> None:
    folders.pipeline("Wan", tmp_path / "model", experts=2, boundary_ratio=0.875)
    arguments = ("model", *folders.sizes("Wan", steps=4), "--tsw", "1", "-q", "--out", "b")
    code, _, err = command(*arguments, cwd=tmp_path)
    assert (code, err) == (0, "")
    first, second = Bundle.open(tmp_path / "b").plans
    assert (first.expert, second.expert) == ("high", "low")


@pytest.mark.parametrize("shards", ["40KB", "10GB"])
def test_weights_are_bound_and_mapped(shards: str, tmp_path: Path) -> None:
    """The network read equals the one saved; its weights are the file's pages, not copies."""
    kept = folders.network("Wan")
    kept.save_pretrained(tmp_path, max_shard_size=shards)
    model = resolve(folders.spec(tmp_path))
    assert all(tensor.is_meta for tensor in model.module.parameters())
    found = model.materialized().state_dict()
    assert found.keys() == kept.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.state_dict().items())
    maps = Path("/proc/self/maps")
    if maps.is_file():
        assert str(tmp_path) in maps.read_text(encoding="utf-8")
    torch.testing.assert_close(
        model(**model.example_inputs), first_tensor(kept.eval()(**model.example_inputs)), atol=1e-5, rtol=1e-5
    )


def test_half_precision_is_cast_and_said(tmp_path: Path) -> None:
    folders.network("Wan").to(torch.bfloat16).save_pretrained(tmp_path)
    model = resolve(folders.spec(tmp_path))
    assert {t.dtype for t in model.materialized().state_dict().values()} == {torch.float32}
    assert any("bfloat16" in note and "float32" in note for note in model.metadata["notes"])


def test_unknown_settings_are_said(tmp_path: Path) -> None:
    folders.transformer("Wan", tmp_path)
    folders.edit_json(tmp_path / "config.json", shiny=True)
    assert any("does not know shiny" in note for note in resolve(folders.spec(tmp_path)).metadata["notes"])


def test_the_pipeline_says_scales_and_schedule(tmp_path: Path) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    folders.pipeline("Wan", tmp_path, scheduler=scheduler)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"scale_factor_temporal": 2, "scale_factor_spatial": 16}')
    model = resolve(folders.spec(tmp_path, guidance=1))
    assert model.example_inputs["hidden_states"].shape == (1, 4, 3, 4, 4)
    scheduler.set_timesteps(4)
    (steps, _) = trajectories(model)
    assert [step["t"] for step in steps] == scheduler.timesteps.tolist()
    assert {step["branch"] for step in steps} == {"cond"}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(4)
    (steps, _) = trajectories(resolve(folders.spec(tmp_path, guidance=1, shift=2.0)))
    assert [step["t"] for step in steps] == scheduler.timesteps.tolist()


SCHEDULERS = [
    diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    diffusers.DDIMScheduler(prediction_type="v_prediction"),
    diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    diffusers.CogVideoXDPMScheduler(prediction_type="v_prediction"),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda one: type(one).__name__)
def test_trajectories_go_as_diffusers_goes(scheduler: Any, tmp_path: Path) -> None:
    """Our loop, beside the one the pipelines write out: the latents of the last step are equal."""
    folders.pipeline("CogVideoX", tmp_path, scheduler=scheduler)
    model = resolve(folders.spec(tmp_path, "CogVideoX", guidance=3))
    steps = trajectories(model)[0]
    assert [step["branch"] for step in steps] == ["cond", "uncond"] * 4
    scheduler.set_timesteps(4)
    generator, memory = torch.Generator().manual_seed(0), None
    latent = torch.randn(1, 3, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    for index, t in enumerate(scheduler.timesteps):
        cond, uncond = steps[2 * index]["inputs"], steps[2 * index + 1]["inputs"]
        torch.testing.assert_close(cond["hidden_states"], latent, atol=1e-4, rtol=1e-4)
        noise = torch.lerp(model(**uncond), model(**cond), 3.0)
        if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
            back = scheduler.timesteps[index - 1] if index else None
            latent, memory = scheduler.step(noise, memory, t, back, latent, generator=generator)
        else:
            latent = scheduler.step(noise, t, latent, return_dict=False)[0]


def test_ltx_shifts_by_length() -> None:
    """A longer latent starts the same and stays at higher noise; --shift overrides the length."""
    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "base_image_seq_len": 1024,
        "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05,
    }  # fmt: skip
    short, long = (Scheduler(config, "x", 8, None, n).timesteps for n in (1024, 4096))
    assert (long[1:] > short[1:]).all()
    assert torch.equal(Scheduler(config, "x", 8, 3.0, 1024).timesteps, Scheduler(config, "x", 8, 3.0, 4096).timesteps)


def test_prompt_embeddings_are_used(tmp_path: Path) -> None:
    folders.transformer("LTX-Video", tmp_path / "model")
    text = {"prompt_embeds": torch.randn(3, 6, 32), "negative_prompt_embeds": torch.randn(1, 6, 32)}
    masks = {"prompt_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0]] * 3)}
    save_file(text | masks, tmp_path / "text.safetensors")
    model = resolve(folders.spec(tmp_path / "model", "LTX-Video", prompt_embeds=tmp_path / "text.safetensors"))
    assert not any("RANDOM" in note for note in model.metadata["notes"])
    made = trajectories(model)
    assert len(made) == 3
    assert torch.equal(made[1][0]["inputs"]["encoder_hidden_states"], text["prompt_embeds"][1:2])
    assert torch.equal(made[2][1]["inputs"]["encoder_hidden_states"], text["negative_prompt_embeds"])
    assert made[0][0]["inputs"]["encoder_attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0]]
    assert made[0][1]["inputs"]["encoder_attention_mask"].tolist() == [[1] * 6]


def test_recorded_trajectories_come_back(tmp_path: Path) -> None:
    """What was recorded calibrates again, bit for bit; text that does not change is stored once a branch."""
    folders.transformer("Wan", tmp_path / "model")
    made = trajectories(resolve(folders.spec(tmp_path / "model")))
    (tmp_path / "record").mkdir()
    for number, one in enumerate(made):
        recorded.save(one, tmp_path / "record" / f"{number}.safetensors")
    stored = load_file(tmp_path / "record" / "0.safetensors")
    assert sum("encoder_hidden_states" in name for name in stored) == 2
    plain = f"{tmp_path / 'model'}?frames=5&height=64&width=64&trajectories={tmp_path / 'record'}"
    again = trajectories(resolve(plain))
    assert [[(s["t"], s["branch"]) for s in one] for one in again] == [[(s["t"], s["branch"]) for s in m] for m in made]
    for one, other in zip((s for m in made for s in m), (s for m in again for s in m), strict=True):
        assert all(torch.equal(one["inputs"][name], other["inputs"][name]) for name in one["inputs"])
    with pytest.raises(ModelError, match=r"hidden_states \[1, 4, 2, 8, 8\] float32, the model takes \[1, 4, 3, 8, 8\]"):
        resolve(plain.replace("frames=5", "frames=9"))


@pytest.mark.parametrize("family", ["Latte", "Allegro", "Cosmos", "SkyReelsV2", "CogVideoX-rotary"])
def test_other_classes_go_by_their_arguments(family: str, tmp_path: Path) -> None:
    """No line of code is theirs; the network is called and the loop closes."""
    folders.pipeline(family, tmp_path, scheduler=diffusers.DDIMScheduler())
    frames = {"Latte": 4, "Allegro": 8, "Cosmos": 9}.get(family, 13)
    model = resolve(f"{tmp_path}?frames={frames}&height=64&width=64&steps=2")
    assert all(torch.isfinite(step["inputs"]["hidden_states"]).all() for one in trajectories(model) for step in one)
