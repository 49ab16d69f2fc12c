"""What the registry says of published models, against the models' own descriptions."""

from __future__ import annotations

from math import prod

import pytest

from vdq_export.sources import registry

# name: (family, parameters in billions, linears). The network of each configuration is counted in test_families.
FACTS = {
    "Wan2.1-T2V-1.3B": ("Wan", 1.419, 306),
    "Wan2.1-T2V-14B": ("Wan", 14.288, 406),
    "Wan2.2-I2V-A14B (each expert)": ("Wan", 14.289, 406),
    "HunyuanVideo": ("HunyuanVideo", 12.821, 547),
    "CogVideoX-2b": ("CogVideoX", 1.694, 245),
    "LTX-Video 2B": ("LTX-Video", 1.923, 287),
    "Latte-1 T2V": ("Latte", 1.057, 454),
}
# family: (frames, height, width), tokens of text, steps, guidance: the defaults of its pipeline
DEFAULTS = {
    "Wan": ((81, 480, 832), 512, 50, 5.0),
    "CogVideoX": ((49, 480, 720), 226, 50, 6.0),
    "Latte": ((16, 512, 512), 120, 50, 7.5),
    "Allegro": ((88, 720, 1280), 512, 100, 7.5),
    "Cosmos": ((121, 704, 1280), 512, 36, 7.0),
    "SkyReelsV2": ((97, 544, 960), 512, 50, 6.0),
}
FAMILIES = {family.name: family for family in registry.FAMILIES}


@pytest.mark.parametrize("name", FACTS)
def test_published_sizes(name: str) -> None:
    family, billions, linears = FACTS[name]
    (found,) = [one for one in FAMILIES[family].published if one.name == name]
    assert (round(found.parameters / 1e9, 3), found.linears) == (billions, linears)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_the_pipelines(name: str) -> None:
    one = FAMILIES[name]
    assert (one.video, one.text_tokens, one.steps, one.guidance) == DEFAULTS[name]


def test_a_typical_video_has_the_tokens_it_is_known_for() -> None:
    """81 frames of 480 × 832: a latent of 21 × 60 × 104, patches of 1 × 2 × 2."""
    latent = FAMILIES["Wan"].latent_size(81, 480, 832)
    assert latent == (21, 60, 104)
    assert prod(latent) // 4 == 32_760


def test_cogvideox_15_gets_whole_patches_of_frames() -> None:
    """81 frames are 21 latent frames, which its pipeline fills up to 22."""
    family = FAMILIES["CogVideoX"]
    size = family.size((81, 768, 1360))
    config = {"in_channels": 16, "patch_size_t": 2}
    assert size.t == 21
    assert family.latent(config, size) == (1, 22, 16, 96, 170)
    assert family.latent({"in_channels": 16}, size) == (1, 21, 16, 96, 170)
