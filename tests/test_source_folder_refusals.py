"""Folders that cannot be read: each through the command, exit code 2 and one line that names file and remedy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import diffusers_folders as folders
from tests import text_encoders
from tests.commands import assert_one_line
from tests.refusals import Case, ask

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="cases are forks")
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def reshaped(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def transformer(folder: Path, edit: Callable[[Path], object], **saving: str) -> None:
    edit(folders.transformer("Wan", folder, **saving))


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return partial(transformer, edit=partial(reshaped, edit=edit))


def config(**changes: object) -> Callable[[Path], None]:
    return partial(transformer, edit=lambda f: folders.edit_json(f / "config.json", **changes))


def pipeline(edit: Callable[[Path], object], experts: int = 1, **index: object) -> Callable[[Path], None]:
    return lambda folder: edit(folders.pipeline("Wan", folder, experts=experts, **index))


def remove_shard(folder: Path) -> None:
    (folder / "diffusion_pytorch_model-00002-of-00009.safetensors").unlink()


def pickled(folder: Path) -> None:
    shutil.move(folder / "transformer" / WEIGHTS, folder / "transformer" / "diffusion_pytorch_model.bin")


def empty(folder: Path) -> None:
    folder.mkdir()


def embeddings(**held: torch.Tensor) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folders.transformer("Wan", folder)
        save_file(held, folder / "text.st")

    return make


def prompts(text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folders.transformer("Wan", folder)
        (folder / "prompts.txt").write_text(text)

    return make


def encoder(edit: Callable[[Path], object]) -> Callable[[Path], None]:
    """A pipeline whose text encoder's folder is changed."""

    def make(folder: Path) -> None:
        folders.pipeline("Wan", folder)
        text_encoders.add(folder, text_encoders.t5(folder), "WanPipeline")
        (folder / "prompts.txt").write_text("a cat\n")
        edit(folder / "text_encoder")

    return make


BIAS = "blocks.0.attn1.to_q.bias"
UNIPC = "UniPCMultistepScheduler"
CASES: dict[str, Case] = {
    "no pipeline": (empty, [], ("no diffusers folder", "model_index.json", "save_pretrained")),
    "missing shard": (
        partial(transformer, edit=remove_shard, max_shard_size="40KB"), [], ("00002-of-00009", "is missing", INDEX),
    ),
    "index elsewhere": (
        partial(
            transformer, edit=lambda f: folders.edit_json(f / INDEX, weight_map={"a": "../a.safetensors"}),
            max_shard_size="40KB",
        ), [], (INDEX, "outside"),
    ),
    "tensor missing": (tensors(lambda t: t.pop(BIAS)), [], (WEIGHTS, BIAS, "is missing", "config.json")),
    "tensor unexpected": (tensors(lambda t: t.update(a=torch.ones(1))), [], (WEIGHTS, "tensor a is unexpected")),
    "other shape": (tensors(lambda t: t.update({BIAS: torch.ones(3)})), [], (WEIGHTS, BIAS, "[3]", "[48]")),
    "other type": (tensors(lambda t: t.update({BIAS: t[BIAS].to(torch.int8)})), [], (WEIGHTS, BIAS, "I8")),
    "config of another size": (config(ffn_dim=64), [], (WEIGHTS, "[96", "[64", "config.json")),
    "no weights": (partial(transformer, edit=lambda f: (f / WEIGHTS).unlink()), [], (WEIGHTS, "is missing")),
    "damaged weights": (
        partial(transformer, edit=lambda f: (f / WEIGHTS).write_bytes(b"x" * 99)), [], (WEIGHTS, "no whole"),
    ),
    "pickled": (pipeline(pickled), [], ("diffusion_pytorch_model.bin", "can run code", ".safetensors")),
    "pickled transformer": (lambda f: pickled_alone(f), [], (".bin", "can run code", ".safetensors")),
    "unknown class": (config(_class_name="Wan3Transformer3DModel"), [], ("config.json", "WanTransformer3DModel")),
    "image class": (config(_class_name="FluxTransformer2DModel"), [], ("config.json", "Transformer3DModel")),
    "remote code": (
        config(auto_map={"AutoModel": "code.Model"}), [], ("config.json", "code.py", "not run", "--allow-remote-code"),
    ),
    "quantized": (config(quantization_config={"bits": 4}), [], ("config.json", "unquantized")),
    "settings that cannot be": (config(num_layers="two"), [], ("config.json", "cannot be built")),
    "unreadable JSON": (
        partial(transformer, edit=lambda f: (f / "config.json").write_text("{")), [], ("config.json", "cannot be read"),
    ),
    "index no JSON": (pipeline(lambda f: (f / "model_index.json").write_bytes(b"\xff")), [], ("model_index.json",)),
    "experts differ": (
        pipeline(lambda f: folders.edit_json(f / "transformer_2" / "config.json", eps=1e-3), 2, boundary_ratio=0.5),
        [], ("transformer_2", "differ in eps"),
    ),
    "experts without boundary": (pipeline(lambda f: f, 2), [], ("model_index.json", "boundary_ratio")),
    "no scheduler": (
        pipeline(lambda f: shutil.rmtree(f / "scheduler")), [], ("scheduler_config.json", "is missing"),
    ),
    "unknown scheduler": (
        pipeline(lambda f: folders.edit_json(f / "scheduler" / "scheduler_config.json", _class_name="Heun")),
        [], ("scheduler_config.json", "'Heun'", UNIPC, "FlowMatchEulerDiscreteScheduler"),
    ),
    "shift of none": (
        pipeline(lambda f: f, scheduler=diffusers.DDIMScheduler()), ["--shift", "3"], ("DDIMScheduler", "--shift"),
    ),
    "too many steps": (
        pipeline(lambda f: f, scheduler=diffusers.DDIMScheduler()), ["--steps", "9999"], ("DDIMScheduler", "--steps"),
    ),
    "frames": (partial(folders.transformer, "Wan"), ["--frames", "6"], ("6 frames", "4k + 1", "5 or 9")),
    "height": (partial(folders.transformer, "Wan"), ["--height", "40"], ("height of 40", "of 16", "32 or 48")),
    "width": (
        partial(folders.transformer, "LTX-Video"), ["--width", "40"], ("width of 40", "multiples of 32", "32 or 64"),
    ),
    "image to video": (
        lambda f: folders.wan_with(f, in_channels=30, out_channels=16), [], ("30", "16", "more than text"),
    ),
    "embeddings of another width": (
        embeddings(prompt_embeds=torch.ones(1, 4, 31)), ["--prompt-embeds", "model/text.st"], ("31 wide", "32"),
    ),
    "no negative embeddings": (
        embeddings(prompt_embeds=torch.ones(1, 4, 32)), ["--prompt-embeds", "model/text.st"],
        ("text.st", "negative_prompt_embeds", "--guidance 1"),
    ),
    "other tensors": (embeddings(x=torch.ones(1)), ["--prompt-embeds", "model/text.st"], ("text.st", "prompt_embeds")),
    "no embeddings": (
        partial(folders.transformer, "Wan"), ["--prompt-embeds", "model/config.json"], ("config.json", "safetensors"),
    ),
    "no trajectories": (partial(folders.transformer, "Wan"), ["--trajectories", "."], ("no recorded trajectories",)),
    "no trajectory": (
        partial(folders.transformer, "Wan"), ["--trajectories", f"model/{WEIGHTS}"], (WEIGHTS, "no recorded"),
    ),
    "trajectories and steps": (
        partial(folders.transformer, "Wan"), ["--trajectories", ".", "--steps", "4"], ("--steps", "exclude"),
    ),
    "one expert's guidance": (
        partial(folders.transformer, "Wan"), ["--guidance-2", "3"], ("one transformer", "--guidance-2"),
    ),
    "option of files": (partial(folders.transformer, "Wan"), ["--timestep-input", "t"], ("--timestep-input", ".onnx")),
    "prompts without an encoder": (prompts("a cat"), ["--prompts", "model/prompts.txt"], ("no text encoder",)),
    "no prompts": (prompts("# none"), ["--prompts", "model/prompts.txt"], ("prompts.txt", "holds no prompt")),
    "pickled encoder": (
        encoder(lambda f: shutil.move(f / "model.safetensors", f / "pytorch_model.bin")), [],
        ("pytorch_model.bin", "can run code", ".safetensors"),
    ),
    "encoder without its tokenizer": (
        encoder(lambda f: shutil.rmtree(f.parent / "tokenizer")), ["--prompts", "model/prompts.txt"],
        ("tokenizer is missing", "--prompt-embeds"),
    ),
    "encoder cut short": (encoder(lambda f: (f / "model.safetensors").write_bytes(b"x" * 9)), [], ("text_encoder",)),
    "code of the pipeline": (
        encoder(lambda f: folders.edit_json(f.parent / "model_index.json", _class_name=["mine", "Pipe"])), [],
        ("model_index.json", "mine.py", "not run", "--allow-remote-code"),
    ),
    "code of the encoder": (
        encoder(lambda f: folders.edit_json(f.parent / "model_index.json", text_encoder=["mine", "Encoder"])), [],
        ("model_index.json", "mine.py", "not run"),
    ),
    "recording nothing": (partial(folders.transformer, "Wan"), ["COMMAND=record"], ("--prompts", "--prompt-embeds")),
    "recording without an encoder": (
        prompts("a cat"), ["COMMAND=record", "--prompts", "model/prompts.txt"], ("no text encoder", "--prompt-embeds"),
    ),
    "options of another source": (empty, ["--frames", "5", "MODEL=sample:digits"], ("sample:digits", "--frames")),
}  # fmt: skip


def pickled_alone(folder: Path) -> None:
    folders.transformer("Wan", folder)
    shutil.move(folder / WEIGHTS, folder / "diffusion_pytorch_model.bin")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    return ask(tmp_path_factory.mktemp("refusals"), CASES)


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_what_and_where(case: str, answers: dict[str, tuple[int, str, str]]) -> None:
    assert_one_line(answers[case], *CASES[case][2])
