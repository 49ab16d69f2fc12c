"""onnxruntime on CPUs: static weights and activations in 8-bit integer kernels, float where integers do not pay.

Linears are standard Q/DQ around Gemm with an int32 bias, which onnxruntime's CPU provider runs as QGemm (integer in,
float out). Float parts go to its fused kernels. Instruction sets differ in one thing that matters: without a
dot-product instruction (VNNI) the u8·s8 kernels of x86 add pairs of products in 16 bits, which saturates; weights then
stay within ±63. Arm's kernels do not: with the dot product they add in 32 bits, and without it they take the activation
less 128, so that a pair is at most 2·128·127 < 2^15 (PAIR_LIMIT). Fewer bits live in the 8-bit types, at 8-bit speed;
16 bits and group scales have no kernel and run dequantized: exact, slower than float.
"""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

from vdq_export.errors import UnknownNameError
from vdq_export.plan import IntType, QuantPlan
from vdq_export.target_spec import Capability, TargetSpec
from vdq_export.targets import _onnxruntime

NAME = "ort-int8"
PASSES = ("ort_rotary", "ort_attention")
# ISA -> largest |q| of a weight. arm: any 64-bit Arm, with the dot product, with i8mm, or with neither.
WEIGHT_QMAX = {"avx512_vnni": 127, "avx_vnni": 127, "arm_dotprod": 127, "arm": 127, "avx2": 63, "generic": 63}
# ISA -> (products added in 16 bits, largest |a| of an activation as the kernel takes it), where it adds any.
PAIR_LIMIT = {"avx2": (2, 255), "generic": (2, 255), "arm": (2, 128)}
INTEGER: tuple[tuple[IntType, IntType], ...] = (("uint8", "int8"),)
_X86_FLAGS = (("avx512_vnni", "avx512_vnni"), ("avx_vnni", "avx_vnni"), ("avx2", "avx2"))
_TRIAL = "trial with onnxruntime 1.31.1, CPU provider"
_READ = "documentation, not tried on an Arm machine: onnxruntime's sources, "
TABLE = (
    Capability(
        subject="Gemm u8 x s8, per-channel weight, int32 bias", supported=True,
        detail="QGemm, float output; 3-4.5x a float Gemm with AVX512-VNNI, 1.6x with AVX2 and 7-bit weights",
        source=_TRIAL,
    ),
    Capability(
        subject="weight DequantizeLinear without a zero point", supported=False,
        detail="nothing is fused: the weight is dequantized in every run, slower than float", source=_TRIAL,
    ),
    Capability(
        subject="MatMul + Add u8 x s8, float bias", supported=False,
        detail="becomes Gemm before the Q/DQ rules run and is then not fused: slower than float", source=_TRIAL,
    ),
    Capability(
        subject="u8 x s8 with |weight| > 63 without VNNI", supported=False,
        detail="16-bit pair sums saturate silently: 12 dB lost", source=_TRIAL,
    ),
    Capability(
        subject="arm: Gemm u8 x s8, |weight| up to 127", supported=True,
        detail="udot kernels with the dot product, ummla with i8mm (Linux), svmmla with SVE; with none of them two s8 "
        "products in 16 bits, which cannot overflow; the graph is that of avx_vnni",
        source=_READ + "mlas/lib/platform.cpp (0112bef) and QgemmS8S8KernelNeon",
    ),
    Capability(
        subject="arm: s8 x s8", supported=True,
        detail="sdot and smmla kernels, no faster than u8 x s8; fused there without session.qdqisint8allowed; not "
        "used, as the same graph would be slow on x86",
        source=_READ + "mlas/lib/platform.cpp (0112bef) and qdq_selector_action_transformer.h",
    ),
    Capability(subject="s8 x s8", supported=False, detail="no vector kernel on x86: 0.2-0.4x float", source=_TRIAL),
    Capability(subject="u8 x u8", supported=True, detail="exact, half the speed of u8 x s8 with VNNI", source=_TRIAL),
    Capability(
        subject="4- and 6-bit activations in u8, 4- and 6-bit weights in s8", supported=True,
        detail="QGemm behind a Clip, at the speed and size of 8 bits", source=_TRIAL,
    ),
    Capability(
        subject="16-bit activations or weights", supported=False,
        detail="run dequantized: exact, 1.2-2x the time of a float Gemm", source=_TRIAL,
    ),
    Capability(
        subject="weights in groups of 32, 64, 128", supported=False,
        detail="run dequantized: exact, 1.1-1.5x the time of a float Gemm", source=_TRIAL,
    ),
    Capability(
        subject="s4 weights", supported=False,
        detail="dequantized in every run, slower than float: 4 bits are kept in s8", source=_TRIAL,
    ),
)  # fmt: skip


def detect_isa() -> str:
    """The instruction set of this machine, as WEIGHT_QMAX names them; "generic" where it cannot be told."""
    machine = platform.machine().lower()
    flags = _cpu_flags()
    if machine in ("arm64", "aarch64"):
        return "arm_dotprod" if flags & {"asimddp", "hw.optional.arm.feat_dotprod"} else "arm"
    return next((isa for flag, isa in _X86_FLAGS if flag in flags), "generic")


def _cpu_flags() -> set[str]:
    """Feature names as the operating system spells them, lower case."""
    try:
        if platform.system() == "Linux":
            lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
            flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), ":")
            return set(flags.split(":", 1)[1].lower().split())
        if platform.system() == "Darwin":
            listed = subprocess.run(["/usr/sbin/sysctl", "-a"], capture_output=True, text=True, timeout=10, check=True)
            pairs = (line.lower().split(":", 1) for line in listed.stdout.splitlines() if ":" in line)
            return {word for key, value in pairs for word in _sysctl_features(key.strip(), value.strip())}
    except (OSError, subprocess.SubprocessError):
        return set()
    return _torch_flags()


def _sysctl_features(key: str, value: str) -> list[str]:
    if key.startswith("machdep.cpu.") and key.endswith("features"):
        return value.replace("avx2.0", "avx2").split()
    return [key] if key.startswith("hw.optional.arm.") and value == "1" else []


def _torch_flags() -> set[str]:
    """What torch knows about the processor; the way on Windows, where no file lists its features."""
    import torch

    try:
        flags = {"avx2"} if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else set()
        vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
    except (AttributeError, RuntimeError):
        return set()
    return flags | ({"avx512_vnni"} if vnni else set())


def spec(isa: str | None = None) -> TargetSpec:
    """The target for `isa`, by default this machine's. Raises UnknownNameError for one that is not listed."""
    chosen = isa or detect_isa()
    if chosen not in WEIGHT_QMAX:
        raise UnknownNameError("instruction set", chosen, WEIGHT_QMAX)
    return TargetSpec(
        name=NAME,
        summary="onnxruntime on CPUs, static 8-bit integer kernels",
        isa=chosen,
        activation_dtype={4: "uint8", 6: "uint8", 8: "uint8", 16: "uint16"},
        weight_dtype={4: "int8", 6: "int8", 8: "int8", 16: "int16"},
        weight_qmax={4: 7, 6: 31, 8: WEIGHT_QMAX[chosen], 16: 32767},
        integer=INTEGER,
        groups=(32, 64, 128),
        min_rows=2,
        isas=tuple(WEIGHT_QMAX),
        table=TABLE,
    )


def session_options(spec: TargetSpec) -> dict[str, str]:
    """onnxruntime session config entries its graphs should run with.

    Weights of linears with float activations become MatMulNBits, which by default rounds its input to 8 bits: 3 dB on
    W8A16. Level 1 computes in float.
    """
    return {"session.qdq_matmulnbits_accuracy_level": "1"}


def integer_layers(optimised_model: Path, plan: QuantPlan) -> dict[str, bool]:
    """For each layer of `plan` that has an integer kernel: does the graph onnxruntime optimised run it there?"""
    return _onnxruntime.integer_layers(optimised_model, plan, INTEGER)
