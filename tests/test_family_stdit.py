"""Open-Sora v1's STDiT: the module does what its description says, and goes the whole way from folder to clip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from tests.families import FAMILIES, tiny_of
from tests.pipelines import sensible
from vdq_export import export, load, sources
from vdq_export.errors import ModelError
from vdq_export.metrics import sqnr_db
from vdq_export.model import Step, first_tensor
from vdq_export.sources import registry
from vdq_export.sources._stdit import STDiT, sinusoids, spatial_positions
from vdq_export.verify import count_kernels

NAME = "Open-Sora STDiT"
FAMILY, TINY = tiny_of(NAME)
WIDTH, FRAMES, SIDE, TOKENS = 48, 4, 8, 8


def network(**settings: Any) -> Any:
    torch.manual_seed(0)
    return sensible(STDiT(**{**TINY.settings, **settings}))


def call(seed: int = 0, tokens: int = TOKENS, words: int | None = None) -> dict[str, torch.Tensor]:
    """words: tokens that are not masked; None: all."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "hidden_states": torch.randn(1, 4, FRAMES, SIDE, SIDE, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, tokens, 32, generator=generator),
        "encoder_attention_mask": torch.ones(1, tokens, dtype=torch.int64),
    }
    made["encoder_attention_mask"][:, words:] = 0 if words else 1
    return made


def answer(made: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return first_tensor(made(**inputs))


# -- the module ------------------------------------------------------------------------------------------------------


def test_the_published_network_has_the_parameters_that_its_description_gives() -> None:
    """28 blocks of 3 attentions and an FFN of 4 C; one projection of the timestep for all; counted from the text."""
    with torch.device("meta"):
        made = STDiT()
    c, text, layers = 1152, 4096, 28
    block = 3 * (4 * c * c + 4 * c) + (8 * c * c + 5 * c) + 6 * c  # attentions, FFN, table
    embedders = (16 * c + c) + (256 * c + c + c * c + c) + (text * c + c + c * c + c)  # patches, timestep, text
    whole = layers * block + embedders + (6 * c * c + 6 * c) + (32 * c + 32 + 2 * c)
    assert sum(parameter.numel() for parameter in made.parameters()) == whole == 759_620_768
    assert {tuple(p.shape) for n, p in made.named_parameters() if n.endswith("attn_temp.qkv.weight")} == {(3 * c, c)}
    (published,) = FAMILY.published
    assert published.parameters == pytest.approx(whole, abs=0.5e6)


def test_parameters_are_named_as_in_published_checkpoints() -> None:
    names = set(STDiT(**TINY.settings).state_dict())
    expected = {
        "x_embedder.proj.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.bias", "t_block.1.weight",
        "y_embedder.y_proj.fc1.weight", "y_embedder.y_proj.fc2.bias", "blocks.0.scale_shift_table",
        "blocks.1.attn.qkv.weight", "blocks.1.attn_temp.proj.bias", "blocks.0.cross_attn.q_linear.weight",
        "blocks.0.cross_attn.kv_linear.bias", "blocks.0.mlp.fc1.weight", "final_layer.linear.weight",
        "final_layer.scale_shift_table",
    }  # fmt: skip
    assert expected <= names


def _only(made: Any, kept: str) -> None:
    """Silence every part of the blocks but `kept`."""
    with torch.no_grad():
        for block in made.blocks:
            for name, part in (("attn", block.attn), ("attn_temp", block.attn_temp), ("cross_attn", block.cross_attn)):
                if name != kept:
                    part.proj.weight.zero_()
                    part.proj.bias.zero_()
            block.mlp.fc2.weight.zero_()


@pytest.mark.parametrize(
    ("kept", "changed"),
    [
        ("attn", lambda t, y, x: t == 1),  # every patch of the frame that changed, and no other frame
        ("attn_temp", lambda t, y, x: (y // 2 == 2) & (x // 2 == 3)),  # that patch, in every frame
        ("none", lambda t, y, x: (t == 1) & (y // 2 == 2) & (x // 2 == 3)),
    ],
)
def test_attention_goes_where_it_should(kept: str, changed: Any) -> None:
    made = network()
    _only(made, kept)
    inputs = call()
    other = {name: tensor.clone() for name, tensor in inputs.items()}
    other["hidden_states"][0, :, 1, 4, 6] += 1.0
    difference = (answer(made, inputs) - answer(made, other)).abs().amax(dim=(0, 1)) > 1e-6
    grid = np.indices((FRAMES, SIDE, SIDE))
    assert np.array_equal(difference.numpy(), np.broadcast_to(changed(*grid), difference.shape))


def test_masked_text_is_not_seen() -> None:
    made, inputs = network(), call()
    inputs["encoder_attention_mask"][0, -3:] = 0
    other = {name: tensor.clone() for name, tensor in inputs.items()}
    other["encoder_hidden_states"][0, -3:] = 7.0
    assert torch.equal(answer(made, inputs), answer(made, other))
    other["encoder_hidden_states"][0, 0] = 7.0
    assert not torch.allclose(answer(made, inputs), answer(made, other))
    short = inputs | {name: inputs[name][:, :-3] for name in ("encoder_hidden_states", "encoder_attention_mask")}
    torch.testing.assert_close(answer(made, short), answer(made, inputs))


def test_positions() -> None:
    """Sines first at frequencies 1 … 1/10000; columns in the first half of the width, rows in the second."""
    row = sinusoids(torch.tensor([3.0]), 8)[0]
    frequencies = 10000.0 ** -(torch.arange(4) / 4)
    torch.testing.assert_close(row, torch.cat([(3 * frequencies).sin(), (3 * frequencies).cos()]))
    grid = spatial_positions(2, 3, 16, scale=0.5).reshape(2, 3, 16)
    torch.testing.assert_close(grid[1, 2, :8], sinusoids(torch.tensor(2 / 0.5), 8))
    torch.testing.assert_close(grid[1, 2, 8:], sinusoids(torch.tensor(1 / 0.5), 8))


def test_a_gate_of_zero_closes_its_branch() -> None:
    """Without any gate and cross-attention a block hands on what it got: text and time reach the end layer only."""
    made = network()
    with torch.no_grad():
        made.t_block[1].weight.zero_()
        made.t_block[1].bias.zero_()
        for block in made.blocks:
            block.scale_shift_table.zero_()
            block.cross_attn.proj.weight.zero_()
            block.cross_attn.proj.bias.zero_()
    before = answer(made, call())
    for block in made.blocks:
        block.attn = block.attn_temp = block.mlp = torch.nn.Identity()
    torch.testing.assert_close(answer(made, call()), before)


# -- from a folder to a clip -----------------------------------------------------------------------------------------


def watched(network: Any, seed: int) -> tuple[np.ndarray[Any, Any], list[Step]]:
    """The latent that `network` ends with, and every call of it."""
    steps: list[Step] = []

    def call_and_note(**given: torch.Tensor) -> torch.Tensor:
        branch: Any = "uncond" if len(steps) % 2 else "cond"
        steps.append({"t": float(given["timestep"]), "branch": branch, "inputs": given})
        return answer(network, given)

    return denoise(call_and_note, seed), steps


def denoise(network: Any, seed: int, steps: int = 20, guidance: float = 7.0) -> np.ndarray[Any, Any]:
    """IDDPM as published: 20 of 1000 linear steps, both branches, the network's own variance of the noise it adds.

    Prompts of 17 and 1 of the 120 tokens. Videos are clipped at 4: those of a random network would leave all bounds.
    """
    scheduler = DDPMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=True, clip_sample_range=4.0,
        variance_type="learned_range", timestep_spacing="linspace",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    latent, prompts = torch.randn(1, 4, FRAMES, SIDE, SIDE, generator=generator), (call(11, 120, 17), call(12, 120, 1))
    for t in scheduler.timesteps:
        cond, uncond = (
            torch.as_tensor(np.asarray(first_tensor(network(**{**one, "hidden_states": latent, "timestep": t[None]}))))
            for one in prompts
        )
        noise, variance = cond.chunk(2, dim=1)
        guided = uncond.chunk(2, dim=1)[0]
        guided = guided + guidance * (noise - guided)
        latent = scheduler.step(torch.cat([guided, variance], dim=1), t, latent, generator=generator).prev_sample
    return latent.numpy()


def test_a_folder_is_exported_and_its_bundle_denoises_like_the_network(tmp_path: Path) -> None:
    made = network()
    made.save_pretrained(tmp_path / "stdit")
    model = sources.resolve(f"{tmp_path / 'stdit'}?frames={FRAMES}&height=64&width=64")
    assert model.metadata["config"]["class"] == "STDiT"
    assert (model.metadata["config"]["steps"], model.metadata["config"]["guidance"]) == (20, 7.0)
    times = [step["t"] for step in next(iter(model.iter_trajectories()))]
    assert (times[0], times[-1], len(set(times)), len(times)) == (999, 0, 20, 40)
    other, steps = watched(made, 5)
    bundle = export(
        replace(model, trajectories=[steps]), target="ort-int8", tsw=4, recipe="static-minmax", out=tmp_path / "bundle"
    )
    kernels, _ = count_kernels(bundle)
    assert 0 < kernels.planned == kernels.executed
    expected, calls = watched(made, 3)
    assert not np.allclose(expected, other)
    with load(bundle.path) as transformer:
        assert transformer.config["in_channels"] == 4  # what a pipeline reads of its network
        found = denoise(transformer, 3)
        answers = [np.asarray(first_tensor(transformer(**one["inputs"]))) for one in calls]
    exact = np.stack([answer(made, one["inputs"]).numpy() for one in calls])
    assert sqnr_db(exact, np.stack(answers)) >= 30
    # A random network says nearly the same of both prompts, so that guidance multiplies what differs, noise too, by 7.
    assert sqnr_db(expected, found) > 15


def test_eight_bits_keep_thirty_decibels(tmp_path: Path) -> None:
    model = FAMILIES[NAME]()
    sensible(model.module)
    bundle = export(model, target="ort-int8", tsw=2, recipe="static-minmax", out=tmp_path / "bundle")
    calls = [step["inputs"] for step in next(iter(model.iter_trajectories()))]
    with load(bundle.path) as transformer:
        found = [np.asarray(first_tensor(transformer(**one))) for one in calls]
    assert sqnr_db(np.stack([model(**one).numpy() for one in calls]), np.stack(found)) >= 30


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    network().save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["blocks.1.attn_temp.qkv.weight"]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"blocks\.1\.attn_temp\.qkv\.weight is missing"):
        sources.resolve(f"{tmp_path}?frames=4&height=64&width=64")


def test_it_is_listed() -> None:
    row = next(one for one in registry.support() if one.class_name == "STDiT")
    assert (row.support, row.tried) == ("registered", True)
