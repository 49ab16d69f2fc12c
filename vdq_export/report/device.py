"""What `verify --device` measured, as plain data: the object `device` of report.json."""

from __future__ import annotations

from typing import Literal

import msgspec

from vdq_export.jsonfile import encode

Device = Literal["htp-emulator", "cuda", "cuda-torch"]
GPU_DEVICES = ("cuda", "cuda-torch")  # the programs of a bundle for GPUs: there, or in plain torch on the CPU


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Quantizer(_Data, frozen=True):
    """How one value enters or leaves an operator. scale, zero_point: one per tensor, none per channel; dtype "float32"
    for a value that is not quantized. channels: number of scales per channel, 0 per tensor.
    """

    value: str
    dtype: str
    scale: float | None = None
    zero_point: int | None = None
    channels: int = 0


class Suspect(_Data, frozen=True):
    """An operator on which device and exact evaluator disagree.

    what: "numbers" (another result), "refused" (does not compile), "no result" (the compiler or the emulator crashed or
    hung), "accumulated" (numbers, but only as the sum over all operators up to this one: no single one is wrong).
    together_with: the operators before it without which it agrees; none when it disagrees alone.
    sqnr_db: device against exact result, fed with the exact inputs. error_steps: root mean square of the difference in
    steps of the output's quantizer. arbiter_db: the exact evaluator (onnxruntime, unoptimised) against the reference
    evaluator in `onnx`; None where that cannot run the operator. message: the compiler's own words.
    reproduction: file name of the operator alone as .onnx, where it was saved.
    """

    node: str
    op: str
    what: Literal["numbers", "accumulated", "refused", "no result"]
    inputs: tuple[Quantizer, ...] = ()
    outputs: tuple[Quantizer, ...] = ()
    together_with: tuple[str, ...] = ()
    sqnr_db: float | None = None
    error_steps: float | None = None
    arbiter_db: float | None = None
    message: str = ""
    reproduction: str = ""


class Bisection(_Data, frozen=True):
    """The search for the first operator that disagrees; suspect: None when the device agrees on the whole graph.

    graph: what was searched. floor_db: agreement below which a difference counts. exact_db, device_db: the graph's
    output against the same graph without rounding of its values, by the exact evaluator and by the device;
    device_db is None when there is no whole result. runs: graphs compiled for the search.
    """

    graph: str
    operators: int
    floor_db: float
    exact_db: float
    device_db: float | None
    runs: int
    seconds: float
    suspect: Suspect | None = None

    def to_json(self) -> bytes:
        return encode(self, "bisection")


class Scales(_Data, frozen=True):
    """The graph's quantizers against those in the backend's own dump.

    quantizers: integer tensors of the graph; found: of these, in the dump under their name. per_channel: of the found
    ones, those with a scale per channel: the dump gives their type and number of scales, not the scales.
    largest_difference: of the scales of the others, relative. mismatches: names with another scale, zero point, type or
    number of scales. foreign: tensors of the dump under other names whose quantizer is none of the graph's.
    float_tensors: tensors inside the graph that the backend keeps in float.
    """

    quantizers: int
    found: int
    per_channel: int
    largest_difference: float
    mismatches: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    float_tensors: tuple[str, ...] = ()


class DeviceBin(_Data, frozen=True):
    """One bin: its graph run by onnxruntime's CPU provider, unoptimised (`exact`), and by the device.

    exact_db, device_db: SQNR of the output against the float model over `steps` calls; drop_db: the first less the
    second. agreement_db: SQNR of the device against the exact result. run_seconds: of one call, mean.
    off_device: nodes left to the CPU. error: the compiler's words when there is no session; then nothing is measured.
    """

    bin: int
    steps: int
    exact_db: float | None = None
    device_db: float | None = None
    drop_db: float | None = None
    agreement_db: float | None = None
    compile_seconds: float | None = None
    run_seconds: float | None = None
    off_device: tuple[str, ...] = ()
    scales: Scales | None = None
    error: str = ""


class DeviceReport(_Data, frozen=True):
    """`bins` as measured, the clips made on the device (psnr_db of the report is theirs), and what --bisect found."""

    device: Device
    arch: str
    tool: str
    bins: tuple[DeviceBin, ...]
    clips: int
    clip_seconds: float | None = None
    bisection: Bisection | None = None
