"""The one ordered list of rewrites from a QDQ graph to one of fused kernels. What none of them takes stays as it is."""

from __future__ import annotations

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph
from vdq_export.targets.cuda import (
    fuse_attention,
    fuse_epilogue,
    fuse_linear,
    fuse_low_rank,
    fuse_low_rank_down,
    fuse_normalize,
    fuse_rope,
    gather_attention,
    quantize_early,
    rejoin,
    rope_tokens,
    trim_table,
)

REWRITES = (
    rejoin,  # first: so that values next to each other are
    rope_tokens,  # before attention is looked for behind it
    fuse_linear,  # the kernels that the others add to, and quantizers on their own
    fuse_low_rank,  # before the epilogue, which stands behind this sum
    gather_attention,  # before what takes one node
    fuse_attention,  # quantizers of heads on their own
    fuse_rope,  # takes them, and before norms those that only it reads
    fuse_epilogue,  # before norms: smoothing and a quantizer behind a linear belong to the linear
    fuse_normalize,  # the quantizers that are left
    quantize_early,  # behind rotations and other steps that end with a move
    fuse_low_rank_down,  # beside what stands in front of a quantizer, whole
    trim_table,  # last: what all of them left over
)


def run(graph: Graph, context: PassContext | None = None) -> list[PassReport]:
    """Run them all on `graph` in place."""
    reports = []
    for rewrite in REWRITES:
        reports.append(rewrite.run(graph, context or PassContext()))
        graph.check()
    return reports
