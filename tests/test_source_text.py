"""Text by a pipeline's own encoders: as its class computes it; recorded for machines without them; code if asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests import diffusers_folders as folders
from tests import text_encoders
from tests.commands import command
from vdq_export import recorded
from vdq_export.errors import ModelError
from vdq_export.recorded import Recorded
from vdq_export.recording import EMBEDDINGS, record
from vdq_export.sources import _remote_code, resolve
from vdq_export.weights import on_demand

PROMPTS = ("a cat walks", "rain, at night")
SIZES = {"frames": 5, "height": 64, "width": 64, "steps": 2}


def folder_of(family: str, pipeline: str, folder: Path, **more: Any) -> Path:
    folders.pipeline(family, folder, **more)
    if family == "HunyuanVideo":
        parts = text_encoders.llama_and_clip(folder)
    else:
        parts = text_encoders.t5(folder, kind="UMT5EncoderModel" if family == "Wan" else "T5EncoderModel")
    (folder / "prompts.txt").write_text("# two\n" + "\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return text_encoders.add(folder, parts, pipeline)


def own(folder: Path, kind: Any, **arguments: Any) -> Any:
    """What the pipeline's own class, made as diffusers would, encodes the first prompt into."""
    parts = {}
    for name, entry in json.loads((folder / "model_index.json").read_text()).items():
        if entry[0] == "transformers":
            parts[name] = getattr(transformers, entry[1]).from_pretrained(folder / name)
    pipeline = kind(**parts, transformer=None, vae=None, scheduler=None)
    return pipeline.encode_prompt(prompt=[PROMPTS[0]], device="cpu", **arguments)


BOTH = ["cond.encoder_hidden_states", "uncond.encoder_hidden_states"]
CASES = {
    "Wan": ("WanPipeline", {"max_sequence_length": 512}, BOTH),
    "CogVideoX": ("CogVideoXPipeline", {"max_sequence_length": 8}, BOTH),
    "LTX-Video": (
        "LTXPipeline", {"max_sequence_length": 128},
        [f"{b}.{n}" for b in ("cond", "uncond") for n in ("encoder_hidden_states", "encoder_attention_mask")],
    ),
    "HunyuanVideo": (
        "HunyuanVideoPipeline", {"max_sequence_length": 256},
        ["cond.encoder_hidden_states", "cond.pooled_projections", "cond.encoder_attention_mask"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", CASES)
def test_text_is_what_the_pipeline_makes_of_it(family: str, tmp_path: Path) -> None:
    pipeline, arguments, names = CASES[family]
    folder_of(family, pipeline, tmp_path)
    sizes = {**SIZES, "frames": 9, "height": 128, "width": 128} if family == "LTX-Video" else SIZES
    chosen = "&".join(f"{name}={value}" for name, value in sizes.items())
    model = resolve(f"{tmp_path}?{chosen}&prompts={tmp_path / 'prompts.txt'}")
    assert not any("RANDOM" in note for note in model.metadata["notes"])
    first, second = (list(one) for one in model.iter_trajectories())
    with torch.no_grad():
        expected = own(tmp_path, getattr(diffusers, pipeline), **arguments)
    steps = {step["branch"]: step["inputs"] for step in first}
    for name, tensor in zip(names, expected, strict=True):
        branch, key = name.split(".")
        torch.testing.assert_close(steps[branch][key].double(), tensor.double())
    one, other = first[0]["inputs"], second[0]["inputs"]
    assert any(not torch.equal(one[name], other[name]) for name in one if "encoder" in name or "pooled" in name)
    assert model.sampler is not None
    assert model.sampler.describe(1) == f"case 1: {PROMPTS[1]} (latents)"


def test_recorded_here_compiled_there(tmp_path: Path) -> None:
    """Through the commands: the machine that compiles has no encoder, and says the sizes from the recording."""
    folder_of("Wan", "WanPipeline", tmp_path / "model")
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    prompts = ("--prompts", "model/prompts.txt")
    code, out, err = command("record", "model", *prompts, *sizes, "--out", "traj", cwd=tmp_path)
    assert code == 0, err
    assert "2 trajectories" in out
    assert "8 calls of the transformer" in out
    files = sorted(one.name for one in (tmp_path / "traj").rglob("*") if one.is_file())
    assert files == ["0000.safetensors", "0001.safetensors", "embeddings.safetensors", "record.json"]
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / "model" / part).rename(tmp_path / part)
    arguments = ("model", "--trajectories", "traj", "--tsw", "2", "-q", "--out", "b")
    code, out, err = command(*arguments, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "2 bins" in out


def test_recording_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Files that are there are kept; the encoder is not needed again; the end is the same to the bit."""
    folder_of("Wan", "WanPipeline", tmp_path / "model")
    given = {"prompts": tmp_path / "model" / "prompts.txt", **SIZES}
    whole = record(str(tmp_path / "model"), tmp_path / "whole", **given)
    assert (whole.prompts, whole.made, whole.calls) == (2, 2, 8)
    record(str(tmp_path / "model"), tmp_path / "cut", **given)
    (tmp_path / "cut" / "0001.safetensors").unlink()
    (tmp_path / "model" / "text_encoder").rename(tmp_path / "gone")
    again = record(str(tmp_path / "model"), tmp_path / "cut", **given)
    assert (again.prompts, again.made, again.calls) == (2, 1, 4)
    for name in ("0000.safetensors", "0001.safetensors", EMBEDDINGS):
        cut, kept = (load_file(tmp_path / folder / name) for folder in ("cut", "whole"))
        assert cut.keys() == kept.keys()
        assert all(torch.equal(cut[tensor], kept[tensor]) for tensor in kept)
    with pytest.raises(ModelError, match="recordings of other settings"):
        record(str(tmp_path / "model"), tmp_path / "cut", **given, seed=3)
    with pytest.raises(ModelError, match="holds no recordings"):
        record(str(tmp_path / "model"), tmp_path / "model", **given)


def test_a_failed_recording_leaves_only_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of("Wan", "WanPipeline", tmp_path / "model")
    written = []

    def failing(steps: Any, path: Path) -> None:
        path.write_bytes(b"half")
        written.append(path)
        raise OSError("disk full")

    monkeypatch.setattr(recorded, "save", failing)
    with pytest.raises(OSError, match="disk full"):
        record(str(tmp_path / "model"), tmp_path / "out", prompts=tmp_path / "model" / "prompts.txt", **SIZES)
    assert written
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["record.json", "text"]


def test_recordings_store_the_latent_of_both_branches_once(tmp_path: Path) -> None:
    folder_of("Wan", "WanPipeline", tmp_path / "model")
    record(str(tmp_path / "model"), tmp_path / "out", prompts=tmp_path / "model" / "prompts.txt", **SIZES)
    steps = next(iter(Recorded(tmp_path / "out")))
    assert steps[0]["inputs"]["hidden_states"] is steps[1]["inputs"]["hidden_states"]
    assert steps[0]["inputs"]["encoder_hidden_states"] is not steps[1]["inputs"]["encoder_hidden_states"]


def test_clips_of_a_recording_are_those_of_the_pipeline(tmp_path: Path) -> None:
    """The loop that was recorded, from its settings: the same clips as the folder's own sampler makes."""
    folder_of("Wan", "WanPipeline", tmp_path / "model")
    prompts = tmp_path / "model" / "prompts.txt"
    record(str(tmp_path / "model"), tmp_path / "traj", prompts=prompts, **SIZES, shift=4.0, guidance=2.0)
    chosen = "&".join(f"{name}={value}" for name, value in SIZES.items())
    whole = resolve(f"{tmp_path / 'model'}?{chosen}&shift=4.0&guidance=2.0&prompts={prompts}")
    again = resolve(f"{tmp_path / 'model'}?trajectories={tmp_path / 'traj'}")
    assert whole.sampler is not None
    assert again.sampler is not None
    for case in (0, 1):
        assert again.sampler.describe(case) == whole.sampler.describe(case)
        one, other = (model.sampler.generate(model.module, case) for model in (again, whole) if model.sampler)
        assert (one == other).all()
    assert again.sampler.settings() == whole.sampler.settings()


def test_guidance_of_the_second_expert(tmp_path: Path) -> None:
    """Below the boundary the prediction is scaled by --guidance-2: the first latent beneath it is the same, the last
    differs."""
    folders.pipeline("Wan", tmp_path, experts=2, boundary_ratio=0.8)
    plain, other = (
        list(next(iter(resolve(folders.spec(tmp_path, guidance=3, **more)).iter_trajectories())))
        for more in ({}, {"guidance_2": 1.5})
    )
    below = next(index for index, step in enumerate(plain) if step["t"] < 800)
    for index in range(below + 2):
        assert torch.equal(plain[index]["inputs"]["hidden_states"], other[index]["inputs"]["hidden_states"])
    assert not torch.equal(plain[-1]["inputs"]["hidden_states"], other[-1]["inputs"]["hidden_states"])


def test_embedded_guidance_is_an_input(tmp_path: Path) -> None:
    folder_of("HunyuanVideo", "HunyuanVideoPipeline", tmp_path)
    text = "&".join(f"{name}={value}" for name, value in SIZES.items())
    model = resolve(f"{tmp_path}?{text}&guidance=4.5")
    assert model.example_inputs["guidance"].tolist() == [4500.0]
    assert {step["branch"] for step in next(iter(model.iter_trajectories()))} == {"cond"}


def test_code_runs_only_when_it_is_allowed(tmp_path: Path) -> None:
    """The folder's own encoder class; and never because a MODEL argument says so."""
    folder_of("Wan", "WanPipeline", tmp_path)
    code = "import transformers\nclass Encoder(transformers.UMT5EncoderModel):\n    pass\n"
    (tmp_path / "text_encoder" / "mine.py").write_text(code)
    folders.edit_json(tmp_path / "model_index.json", text_encoder=["mine", "Encoder"])
    with pytest.raises(ModelError, match=r"mine\.py: Encoder.*not run"):
        resolve(folders.spec(tmp_path, steps=1))
    with pytest.raises(ModelError, match="allow_remote_code"):
        resolve(folders.spec(tmp_path, steps=1, allow_remote_code=True))
    with _remote_code.allowed():
        assert not any("RANDOM" in note for note in resolve(folders.spec(tmp_path, steps=1)).metadata["notes"])


def test_encoders_larger_than_memory_are_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of("Wan", "WanPipeline", tmp_path)
    monkeypatch.setattr(on_demand, "SHARE", 1e-12)
    notes = resolve(folders.spec(tmp_path, steps=1)).metadata["notes"]
    assert any("more than half of the memory" in note and "RANDOM" in note for note in notes)
    with pytest.raises(ModelError, match="record on a larger machine"):
        resolve(folders.spec(tmp_path, steps=1, prompts=tmp_path / "prompts.txt"))


def test_without_transformers_text_is_random_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of("Wan", "WanPipeline", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    notes = resolve(folders.spec(tmp_path, steps=1)).metadata["notes"]
    assert any("pip install 'vdq-export[text]'" in note and "RANDOM" in note for note in notes)
    with pytest.raises(Exception, match=r"pip install 'vdq-export\[text\]'"):
        resolve(folders.spec(tmp_path, steps=1, prompts=tmp_path / "prompts.txt"))
