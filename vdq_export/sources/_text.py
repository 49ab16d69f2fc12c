"""Text embeddings by a pipeline folder's own encoders, as its diffusers class computes them for the transformer.

The class is made from the folder's tokenizers and text encoders alone, without transformer and VAE, and its
encode_prompt() is called as its __call__() would. Weights are safetensors, nothing is downloaded, no code of the folder
is run (unless the person allowed it: _remote_code).
"""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vdq_export.errors import MissingToolError, ModelError
from vdq_export.sources import _remote_code

Prompt = Mapping[str, Mapping[str, torch.Tensor]]  # branch -> input -> tensor with B = 1
PROMPTS = (  # where a person gives none: motion, people, a close view, a wide one
    "A cat walks on the grass, realistic style.",
    "A woman in a red coat crosses a busy street in the rain at night, reflections on the wet asphalt, slow motion.",
    "Macro shot of a bee landing on a sunflower, shallow depth of field, soft morning light.",
    "A drone flies over snowy mountains at sunrise, clouds drifting through the valleys.",
)
INSTALL = "pip install 'vdq-export[text]'"
_CLEANING = "pip install ftfy beautifulsoup4; or give --prompt-embeds"
_PART = re.compile(r"(text_encoder|tokenizer)(_\d)?")
_TEXT, _MASK = "encoder_hidden_states", "encoder_attention_mask"
# What encode_prompt() returns, by how much it is: the transformer's input each; "-": of the negative branch.
_BY_COUNT = {2: (_TEXT, f"-{_TEXT}"), 4: (_TEXT, _MASK, f"-{_TEXT}", f"-{_MASK}")}
_BY_PIPELINE = {  # where that does not say; a class without a negative_prompt is called twice
    "HunyuanVideoPipeline": (_TEXT, "pooled_projections", _MASK),
    "HunyuanVideo15Pipeline": (_TEXT, _MASK, f"{_TEXT}_2", f"{_MASK}_2"),
    "EasyAnimatePipeline": (_TEXT, f"-{_TEXT}", _MASK, f"-{_MASK}"),
}
_CHOSEN = {"num_videos_per_prompt": 1, "num_images_per_prompt": 1, "mask_feature": False, "device": "cpu"}


def parts(index: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Names of the tokenizers and text encoders that a pipeline's index lists -> [library, class]."""
    return {
        name: entry
        for name, entry in index.items()
        if _PART.fullmatch(name) and isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
    }


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines and lines that begin with # count for nothing.

    Raises ModelError for a file that cannot be read or holds none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path} cannot be read: {error}", hint="--prompts is a text file, one prompt a line"
        ) from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ModelError(f"{path} holds no prompt", hint="write one a line")
    return prompts


def encode(
    folder: Path,
    index: Mapping[str, Any],
    pipelines: Sequence[str],
    prompts: Sequence[str],
    negative: str = "",
    tokens: int | None = None,
) -> list[Prompt]:
    """The inputs of every prompt's two branches, float32 and int64.

    pipelines: class names to try where the folder's index names none of diffusers'. tokens: of a text, where the
    transformer's configuration fixes them; None: the pipeline's own.
    Raises MissingToolError without transformers, ModelError for encoders that cannot be read, code of the folder's own,
    and prompts that come out at unlike lengths.
    """
    pipeline = _pipeline(folder, index, pipelines)
    encoded = []
    try:
        with torch.no_grad():
            encoded = [_encode(pipeline, prompt, negative, tokens) for prompt in prompts]
    except NameError as error:  # diffusers imports what is there and misses the rest when it is used
        raise MissingToolError(
            f"{type(pipeline).__name__} needs {error.name} to encode text", hint=_CLEANING
        ) from error
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(
            f"{folder}: {type(pipeline).__name__} fails to encode a prompt: {why}", hint="give --prompt-embeds"
        ) from error
    finally:
        del pipeline
        gc.collect()  # an encoder can be larger than what is compiled
    shapes = [{name: tuple(t.shape) for branch in one.values() for name, t in branch.items()} for one in encoded]
    for prompt, shape in zip(prompts, shapes, strict=True):
        if shape != shapes[0]:
            raise ModelError(f"{folder}: {prompt!r} is encoded as {shape}, the first prompt as {shapes[0]}")
    return encoded


def _encode(pipeline: Any, prompt: str, negative: str, tokens: int | None) -> Prompt:
    taken = inspect.signature(pipeline.encode_prompt).parameters
    given = _defaults(type(pipeline)) | _CHOSEN | {"negative_prompt": [negative], "do_classifier_free_guidance": True}
    if tokens is not None:
        given["max_sequence_length"] = tokens
    if not all(find_spec(name) for name in ("bs4", "ftfy")):
        given["clean_caption"] = False  # as the pipelines do then, with a warning each time
    given = {name: value for name, value in given.items() if name in taken}
    cond = _named(type(pipeline).__name__, pipeline.encode_prompt(prompt=[prompt], **given))
    if "negative_prompt" in taken:
        return cond
    uncond = _named(type(pipeline).__name__, pipeline.encode_prompt(prompt=[negative], **given))
    return {"cond": cond["cond"], "uncond": uncond["cond"]}


def _defaults(kind: type[Any]) -> dict[str, Any]:
    """What the pipeline's own __call__ hands on, such as max_sequence_length, where encode_prompt's default differs."""
    call, encode_prompt = (inspect.signature(f).parameters for f in (kind.__call__, kind.encode_prompt))
    return {
        name: one.default
        for name, one in call.items()
        if name in encode_prompt and one.default is not one.empty and one.default is not None
    }


def _named(kind: str, results: Sequence[torch.Tensor | None]) -> dict[str, dict[str, torch.Tensor]]:
    """Results of encode_prompt() by branch and input."""
    names = _BY_PIPELINE.get(kind) or _BY_COUNT.get(len(results))
    if names is None or len(names) != len(results):
        raise ModelError(
            f"{kind} encodes a prompt into {len(results)} tensors, unknown here", hint="use --prompt-embeds"
        )
    found: dict[str, dict[str, torch.Tensor]] = {"cond": {}, "uncond": {}}
    for name, tensor in zip(names, results, strict=True):
        if tensor is not None:
            kept = tensor.float() if tensor.is_floating_point() and _MASK not in name else tensor.to(torch.int64)
            found["uncond" if name.startswith("-") else "cond"][name.removeprefix("-")] = kept.contiguous()
    return found


def _pipeline(folder: Path, index: Mapping[str, Any], pipelines: Sequence[str]) -> Any:
    """The folder's pipeline with tokenizers and text encoders and nothing else."""
    library = _transformers()
    kind = _kind(folder, index, pipelines)
    made: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        entry = parts(index).get(name)
        if entry is not None:
            made[name] = _part(folder, name, entry, library)
        elif parameter.default is parameter.empty:
            made[name] = None
    try:
        return kind(**made)
    except ImportError:  # of a part that encodes nothing, such as a safety checker
        bare = kind.__new__(kind)
        bare.register_modules(**made)
        return bare
    except Exception as error:  # what a class makes of parts that are not there is its own affair
        raise ModelError(
            f"{folder}: {kind.__name__} cannot be made without its other parts: {' '.join(str(error).split())}",
            hint="give --prompt-embeds",
        ) from error


def _transformers() -> Any:
    try:
        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise MissingToolError("encoding text needs transformers, which is not installed", hint=INSTALL) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _kind(folder: Path, index: Mapping[str, Any], pipelines: Sequence[str]) -> Any:
    """The pipeline's class: the one the index names, else a known one of the transformer's family."""
    import diffusers

    named = index.get("_class_name")
    if isinstance(named, list):
        return _remote_code.load(folder, str(named[0]), str(named[-1]), folder / "model_index.json")
    for name in (str(named), *pipelines):
        kind = getattr(diffusers, name, None)
        if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline) and hasattr(kind, "encode_prompt"):
            return kind
    raise ModelError(
        f"{folder / 'model_index.json'}: {named!r} is no pipeline of the installed diffusers that encodes text",
        hint="give --prompt-embeds",
    )


def _part(folder: Path, name: str, entry: Sequence[Any], library: Any) -> Any:
    """A tokenizer or encoder. Raises ModelError for pickled weights and whatever does not load."""
    place, (origin, kind_name) = folder / name, entry
    if not place.is_dir():
        raise ModelError(f"{place} is missing, which model_index.json names", hint="fetch it, or give --prompt-embeds")
    if origin in ("transformers", "diffusers"):
        kind = getattr(library, str(kind_name), None)
    else:
        kind = _remote_code.load(folder, f"{name}/{origin}", str(kind_name), folder / "model_index.json")
    if kind is None:
        raise ModelError(f"{folder}: the installed transformers has no {kind_name}", hint="give --prompt-embeds")
    arguments: dict[str, Any] = {"local_files_only": True}
    if origin == "transformers":
        arguments["trust_remote_code"] = False  # unsaid, transformers asks whoever sits at the terminal
    if name.startswith("text_encoder"):
        pickles = sorted(one.name for pattern in ("*.bin", "*.pt", "*.pth") for one in place.glob(pattern))
        if pickles and not any(place.glob("*.safetensors")):
            raise ModelError(
                f"{place / pickles[0]} is a pickled checkpoint, which can run code when it is loaded, and is refused",
                hint="convert it to .safetensors, or give --prompt-embeds",
            )
        arguments |= {"use_safetensors": True, "dtype": "auto"}
    try:
        made = kind.from_pretrained(str(place), **arguments)
    except ImportError as error:
        raise MissingToolError(f"{place} does not load: {' '.join(str(error).split())}", hint=INSTALL) from error
    except Exception as error:  # transformers raises whatever its readers raise
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ModelError(f"{place} does not load: {why}", hint="fetch it again, or give --prompt-embeds") from error
    return made.eval() if name.startswith("text_encoder") else made
