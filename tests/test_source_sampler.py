"""Clips of folders: the pipeline's own loop and VAE, equal for equal networks, compared by verify and run."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from tests import diffusers_folders as folders
from tests.commands import command
from vdq_export import sources
from vdq_export.model import Step
from vdq_export.sources import _sampler, resolve

SIZE = "frames=5&height=64&width=64&steps=3&guidance=3"


def with_vae(folder: Path) -> Path:
    """A Wan pipeline with a VAE of 16 latent channels, 8 × 8 pixels and 4 frames each."""
    folders.pipeline("Wan", folder)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[2.0] * 4
    )
    vae.save_pretrained(folder / "vae")
    return folder


def test_latents_are_the_clip_of_a_folder_without_a_vae(tmp_path: Path) -> None:
    """Every channel is in the picture, beside the others; two cases differ, one case is always the same."""
    folders.transformer("Wan", tmp_path)
    model = resolve(f"{tmp_path}?{SIZE}")
    sampler = model.sampler
    assert sampler is not None
    seen: list[Step] = []
    clip = sampler.generate(model.module, 0, seen.append)
    assert clip.shape == (1, 2, 2 * 8, 2 * 8)
    assert 0 <= clip.min() < clip.max() <= 1
    assert [step["branch"] for step in seen] == ["cond", "uncond"] * 3
    assert np.array_equal(clip, sampler.generate(model.module, 0))
    assert not np.array_equal(clip, sampler.generate(model.module, 1))
    calibrated = [step["inputs"]["hidden_states"] for one in model.iter_trajectories() for step in one]
    assert not any(torch.equal(seen[0]["inputs"]["hidden_states"], latent) for latent in calibrated)
    assert sampler.settings() == {
        "name": "UniPCMultistepScheduler", "steps": 3, "guidance": 3.0, "clip": "latents",
    }  # fmt: skip


def test_the_folders_own_vae_decodes(tmp_path: Path) -> None:
    """As the pipeline does it: the latents' scale by channel first."""
    model = resolve(f"{with_vae(tmp_path)}?{SIZE}")
    sampler = model.sampler
    assert isinstance(sampler, _sampler.FolderSampler)
    clip = sampler.generate(model.module, 0)
    assert clip.shape == (3, 5, 64, 64)
    assert sampler.settings()["clip"] == "decoded"
    latent = sampler._loop.run(model.module, 0, _sampler.FIRST_SEED)
    vae = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "vae")
    with torch.no_grad():
        video = vae.decode(latent * 2.0 + 0.1, return_dict=False)[0]
    expected = (video[0] / 2 + 0.5).clamp(0, 1).numpy()
    np.testing.assert_allclose(clip, expected, atol=1e-5)


def test_a_large_video_is_compared_in_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sampler, "MAX_PIXELS", 5 * 64 * 64 - 1)
    sampler = resolve(f"{with_vae(tmp_path)}?{SIZE}").sampler
    assert sampler is not None
    assert sampler.settings()["clip"] == "latents"
    assert "(latents)" in sampler.describe(0)


def test_verify_and_run_compare_clips(tmp_path: Path) -> None:
    """Through the commands, decoded; the schedule says what it was calibrated for."""
    with_vae(tmp_path / "model")
    arguments = (f"model?{SIZE}", "--tsw", "1", "--recipe", "static-minmax", "-q", "--out", "b")
    code, _, err = command(*arguments, cwd=tmp_path)
    assert (code, err) == (0, "")
    code, out, err = command("verify", "b", "--json", "--clips", "1", cwd=tmp_path)
    assert code == 0, out + err
    assert '"psnr_db":' in out
    assert '"psnr_db":null' not in out.replace(" ", "")
    code, out, err = command("run", "b", "--clips", "1", "-q", cwd=tmp_path)
    assert code == 0, out + err
    assert (tmp_path / "clips" / "side-by-side.png").is_file()


def test_mosaics_hold_every_channel() -> None:
    latent = torch.arange(5.0).reshape(1, 5, 1, 1, 1).expand(1, 5, 2, 3, 4)
    picture = _sampler._mosaic(latent)
    assert picture.shape == (1, 2, 2 * 3, 3 * 4)
    values = (picture[0, 0, ::3, ::4] - 0.5) * 8
    assert values.tolist() == [[0, 1, 2], [3, 4, 0]]


def test_an_option_string_is_all_there_is() -> None:
    """Permission to run code is never part of a MODEL argument."""
    assert "allow" not in sources.with_options("x", frames=3, seed=1, guidance_2=2.0)
