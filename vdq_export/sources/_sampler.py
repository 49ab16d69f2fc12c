"""Whole clips of a model read from a folder, so that `verify` and `run` compare what people would see.

A clip is what the folder's own VAE decodes, where there is one and memory suffices; else the latents themselves, their
channels side by side in one grey picture, −4 … 4 as black … white.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vdq_export.errors import ModelError
from vdq_export.model import Denoiser, Step
from vdq_export.sources._denoise import Loop
from vdq_export.sources._weights import read_json

MAX_PIXELS = 2**23  # frames × height × width that a VAE decodes here: 33 frames of 512 × 480
LATENT_PEAK = 4.0
FIRST_SEED = 10_000  # noise that nothing was calibrated on
CLIPS = 2  # that verify makes unless told otherwise: a clip is all steps of two networks
_STEM = "diffusion_pytorch_model"


class FolderSampler:
    """vdq_export.model.Sampler of a folder. labels: of the prompts, "" for ones that have no words."""

    clips = CLIPS

    def __init__(self, loop: Loop, labels: list[str], vae: Path | None) -> None:
        self._loop, self._labels, self._vae = loop, labels, _affordable(vae, loop)
        self._decoder: Any = None
        self.steps = loop.scheduler.steps
        self.timesteps = tuple(float(t) for t in loop.scheduler.timesteps)

    def generate(self, denoiser: Denoiser, case: int, observer: Callable[[Step], None] | None = None) -> np.ndarray:
        """Clip number `case`: prompts in turn, noise of its own. [C, F, H, W] in [0, 1]."""
        prompt = case % len(self._loop.prompts)
        latent = self._loop.run(denoiser, prompt, FIRST_SEED + case, observer)
        latent = self._channels_first(latent)
        clip = _mosaic(latent) if self._vae is None else self._decode(latent)
        found: np.ndarray = clip.clamp(0, 1).float().numpy()
        return found

    def describe(self, case: int) -> str:
        label = self._labels[case % len(self._labels)] or f"prompt {case % len(self._labels)}"
        return f"case {case}: {label}{'' if self._vae else ' (latents)'}"

    def settings(self) -> dict[str, Any]:
        return {**self._loop.settings(), "clip": "latents" if self._vae is None else "decoded"}

    def _channels_first(self, latent: torch.Tensor) -> torch.Tensor:
        """[1, C, T, H, W] of a latent in the family's layout; of one that no layout describes, one picture."""
        layout, size = self._loop.call.family.layout, self._loop.call.size
        if self._loop.call.family.hidden_states is not None:
            return latent.reshape(1, 1, 1, -1, latent.shape[-1])
        if layout == "THWC":
            return latent.permute(0, 4, 1, 2, 3)
        if layout == "TCHW":
            return latent.transpose(1, 2)
        if layout == "tokens":
            return latent.transpose(1, 2).reshape(1, -1, size.t, size.h, size.w)
        return latent

    def _decode(self, latent: torch.Tensor) -> torch.Tensor:
        """[3, F, H, W] in [0, 1] as diffusers' pipelines decode it: its own scale first, then the VAE."""
        assert self._vae is not None
        if self._decoder is None:
            self._decoder = _load(self._vae)
        config: Mapping[str, Any] = self._decoder.config
        latent = _unscaled(latent, config)
        try:
            with torch.no_grad():
                if "2D" in str(config.get("up_block_types")) or not _takes_video(self._decoder):
                    frames = latent[0].transpose(0, 1)  # a VAE of images decodes each frame
                    video = self._decoder.decode(frames, return_dict=False)[0].transpose(0, 1)
                else:
                    video = self._decoder.decode(latent, return_dict=False)[0][0]
        except (RuntimeError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ModelError(
                f"{self._vae} fails to decode {list(latent.shape)}: {why}", hint="verify --clips 0"
            ) from error
        picture: torch.Tensor = video / 2 + 0.5
        return picture


def _affordable(vae: Path | None, loop: Loop) -> Path | None:
    """The VAE's folder, if its weights are there and the clip is small enough."""
    size = loop.call.size
    if vae is None or loop.call.family.hidden_states is not None:
        return None
    if size.frames * size.height * size.width > MAX_PIXELS:
        return None
    held = any((vae / f"{_STEM}.safetensors{end}").is_file() for end in ("", ".index.json"))
    # One that is told the timestep of the noise left over (LTX's) is part of the sampler: latents are compared.
    return vae if held and not read_json(vae / "config.json").get("timestep_conditioning") else None


def _load(vae: Path) -> Any:
    """The folder's VAE, float32. Raises ModelError where the installed diffusers cannot read it."""
    import diffusers

    name = str(read_json(vae / "config.json").get("_class_name"))
    kind = getattr(diffusers, name, None)
    if kind is None or not name.startswith("Autoencoder"):
        raise ModelError(
            f"{vae / 'config.json'}: {name!r} is no VAE of the installed diffusers", hint="verify --clips 0"
        )
    try:
        return kind.from_pretrained(str(vae), use_safetensors=True, local_files_only=True).eval()
    except Exception as error:  # diffusers raises whatever its readers raise
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ModelError(f"{vae} does not load: {why}", hint="fetch it again, or verify --clips 0") from error


def _takes_video(decoder: Any) -> bool:
    return any(isinstance(one, torch.nn.Conv3d) for one in decoder.modules())


def _unscaled(latent: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Latents as the VAE encodes them: those of the network are scaled, by channel or as a whole."""
    latent = latent / float(config.get("scaling_factor") or 1.0)
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None or deviation is None:
        return latent + float(config.get("shift_factor") or 0.0)
    shape = (1, -1, 1, 1, 1)
    return latent * torch.tensor(deviation).view(shape) + torch.tensor(mean).view(shape)


def _mosaic(latent: torch.Tensor) -> torch.Tensor:
    """[1, T, rows · H, columns · W] of [1, C, T, H, W], in [0, 1]; missing places are grey."""
    channels, t, h, w = latent.shape[1:]
    rows = math.isqrt(channels)
    columns = -(-channels // rows)
    held = torch.zeros(rows * columns, t, h, w)
    held[:channels] = latent[0]
    picture = held.view(rows, columns, t, h, w).permute(2, 0, 3, 1, 4).reshape(1, t, rows * h, columns * w)
    return picture / (2 * LATENT_PEAK) + 0.5
