"""Folders that cannot be read: each through the command, exit code 2 and one line that names file and remedy.

One process loads the libraries and forks for each case, so that each is a process of its own and none waits for them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import diffusers_folders as folders
from tests.commands import ENVIRONMENT, assert_one_line

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="cases are forks")
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_FORKS = """
import json, os, sys, torch, diffusers.models.transformers
from diffusers import WanTransformer3DModel
import vdq_export.compiler, vdq_export.commands.export
from vdq_export.cli import main
for number, arguments in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if child == 0:
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_CREAT | os.O_WRONLY), fd)
        sys.argv = ["vdq-export", *arguments]
        try:
            main()
        except SystemExit as stop:  # the libraries' own ends are not made for forks
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(stop.code)
        os._exit(70)
    open(f"{number}.code", "w").write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


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


BIAS = "blocks.0.attn1.to_q.bias"
UNIPC = "UniPCMultistepScheduler"
CASES: dict[str, tuple[Callable[[Path], object], list[str], tuple[str, ...]]] = {
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
    "remote code": (config(auto_map={"AutoModel": "code.Model"}), [], ("config.json", "never run")),
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
    "width": (partial(folders.transformer, "LTX-Video"), ["--width", "40"], ("width of 40", "multiples of 32", "32 or 64")),
    "no default size": (partial(folders.transformer, "SkyReelsV2"), [], ("--frames, --height and --width",)),
    "unknown argument": (partial(folders.transformer, "HunyuanVideo"), [], ("'pooled_projections'", "known:")),
    "image to video": (
        lambda f: folders.wan_with(f, in_channels=36, out_channels=16), [], ("36", "16", "text-to-video"),
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
    "options of another source": (empty, ["--frames", "5", "MODEL=sample:digits"], ("sample:digits", "--frames")),
}  # fmt: skip


def pickled_alone(folder: Path) -> None:
    folders.transformer("Wan", folder)
    shutil.move(folder / WEIGHTS, folder / "diffusion_pytorch_model.bin")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Case -> (exit code, stdout, stderr) of the command, run in the folder beside "model"."""
    root = tmp_path_factory.mktemp("refusals")
    arguments = []
    for number, (make, options, _) in enumerate(CASES.values()):
        home = root / str(number)
        home.mkdir()
        make(home / "model")
        model = next((one.removeprefix("MODEL=") for one in options if one.startswith("MODEL=")), f"{number}/model")
        own = [
            f"{number}/{one}" if one.startswith("model/") else one for one in options if not one.startswith("MODEL=")
        ]
        arguments.append([model, *own, "--out", f"{number}/bundle", "-q"])
    forks = [sys.executable, "-c", _FORKS]
    subprocess.run(forks, input=json.dumps(arguments), text=True, cwd=root, env=ENVIRONMENT, check=True, timeout=100)
    assert not list(root.glob("*/bundle*"))  # nothing is written, not even half
    read = [
        [(root / f"{number}.{part}").read_text() for part in ("code", "out", "err")] for number in range(len(CASES))
    ]
    return {case: (int(code), out, err) for case, (code, out, err) in zip(CASES, read, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_what_and_where(case: str, answers: dict[str, tuple[int, str, str]]) -> None:
    assert_one_line(answers[case], *CASES[case][2])
