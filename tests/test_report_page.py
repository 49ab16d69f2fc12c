"""The report page: one file without network, the same for the same bundle, and used in headless Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from bokeh.models import LinearColorMapper

from tests.commands import ENVIRONMENT, ROOT
from tests.host_cases import CHROMIUM, HOST, needs_chromium, node
from vdq_export.bundle import Bundle
from vdq_export.report.cells import Cell, cells
from vdq_export.report.content import ClipPair, Content, gather
from vdq_export.report.data import JudgeScores, KernelCount, LayerQuality, StepError, VerifyReport
from vdq_export.report.figures import heat_map
from vdq_export.report.page import render
from vdq_export.report.ranges import RANGES, RangesReport

LIMIT = 8_000_000  # bytes


def clip(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((3, 3, 6, 10))


def measured(bundle: Bundle) -> VerifyReport:
    """Made up: every layer another number, one of them below the threshold."""
    layers = [layer.name for layer in bundle.plan.layers if layer.quantized]
    qualities = [
        LayerQuality(layer=name, bin=one.index, sqnr_db=20.0 + number + one.index / 4, worst_step=one.steps[0])
        for one in bundle.plan.bins
        for number, name in enumerate([*layers, "sample"])
    ]
    qualities[0] = msgspec.structs.replace(qualities[0], sqnr_db=3.25)
    return VerifyReport(
        verdict="fail",
        bundle_bytes=bundle.size,
        integer_kernels=KernelCount(planned=40, executed=39),
        psnr_db=31.5,
        judge=JudgeScores(float_={"digit": 1.0}, quantized={"digit": 0.75}),
        layers=tuple(qualities),
        failures=(f"{layers[0]} in bin00: SQNR 3.2 dB is below 12",),
        growth=tuple(StepError(t=t, sqnr_db=t / 20) for t in (800.0, 550.0, 300.0, 120.0, 20.0)),
    )


@pytest.fixture(scope="module")
def content(made: Path) -> Content:
    """The tiny bundle, measured and with two clips, compared with itself."""
    opened = Bundle.open(made / "bundle")
    clips = tuple(ClipPair.of(f"case {n} <&>", clip(n), np.clip(clip(n) + 0.03, 0, 1)) for n in range(2))
    whole = replace(gather(opened), verify=measured(opened), clips=clips)
    return replace(whole, against=replace(gather(opened), clips=(clips[1],)))


@pytest.fixture(scope="module")
def page(content: Content, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("page") / "report.html"
    place.write_bytes(render(content))
    return place


class Tags(HTMLParser):
    """Every address in the page's tags, and the tags that were not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset", "data")]
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_that_asks_for_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    tags = Tags(text)
    assert tags.open == [] and len(tags.addresses) > 6
    assert [one[:40] for one in tags.addresses if not one.startswith("data:")] == []
    assert "default-src 'none'" in text[: text.index("<title>")], "and the browser holds it to that"
    assert "url(" not in text[: text.index("</style>")] and "@import" not in text[: text.index("</style>")]
    assert page.stat().st_size < LIMIT


def test_names_are_text_wherever_they_stand(content: Content) -> None:
    """A model's name is somebody else's: in the page's tags and in its JSON it must stay what it is."""
    evil = "</script><script>alert(1)</script>"
    manifest = content.bundle.manifest
    named = msgspec.structs.replace(manifest, model=msgspec.structs.replace(manifest.model, name=evil))
    layers = tuple(msgspec.structs.replace(one, name=one.name + evil) for one in content.bundle.plan.layers)
    plan = msgspec.structs.replace(content.bundle.plan, layers=layers)
    bundle = Bundle(content.bundle.path, named, content.bundle.schedule, (plan,))
    text = render(replace(content, bundle=bundle)).decode()
    assert "<script>alert" not in text and text.count("<script") == render(content).decode().count("<script")
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text and "\\u003c/script>" in text


def test_equal_bundles_give_equal_pages(content: Content, page: Path, made: Path, tmp_path: Path) -> None:
    """In this process, where Bokeh has counted its models further, and in another one with other hashes."""
    assert render(content) == page.read_bytes()
    shutil.copytree(made / "bundle", tmp_path / "elsewhere")
    script = (
        "import sys; from pathlib import Path; from vdq_export.bundle import Bundle\n"
        "from vdq_export.report.content import gather; from vdq_export.report.page import render\n"
        "sys.stdout.buffer.write(render(gather(Bundle.open('elsewhere'))))"
    )
    environment = {**ENVIRONMENT, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, check=True
    )
    assert done.stdout == render(gather(content.bundle))
    assert str(ROOT).encode() not in done.stdout


def test_the_page_says_what_it_was_given(page: Path, content: Content) -> None:
    text = page.read_text(encoding="utf-8")
    for said in (
        "Fails", "SQNR 3.2 dB is below 12", "3.2 dB", "31.5 dB", "39 of 40", "100% → 75%", "✗<span", "✓<span",
        "case 1 &lt;&amp;&gt;", "name = &#34;static-asq&#34;", content.bundle.manifest.model.weight_hash,
        "Hoisted: ", "weights that bins share", "vdq-export verify BUNDLE",
    ):  # fmt: skip
        assert said in text, said
    plots = json.loads(re.findall(r'id="plots">(.*?)</script>', text)[0])
    assert list(plots) == ["heat", "ranges", "growth"]


def heat(cells: list[Cell], threshold: float = 12.0) -> tuple[Any, Any, LinearColorMapper]:
    """(the plot, its data, its colours)"""
    plot: Any = heat_map(cells, threshold, {"bin00": "500–1000"})
    (drawn,) = [one for one in plot.renderers if type(one.glyph).__name__ == "Rect"]
    assert drawn.glyph.fill_color.field == "sqnr_db"
    return plot, drawn.data_source.data, drawn.glyph.fill_color.transform


def test_one_broken_layer_takes_no_colours_from_the_others(content: Content) -> None:
    plain = cells(content)
    _, data, colours = heat(plain)
    assert (colours.low, colours.high, len(colours.palette)) == (2.0, 52.0, 50)
    assert all(name.startswith(("#a", "#b", "#c", "#d")) for name in colours.palette[:10]), "red below the threshold"
    assert data["mark"] == ["×" if one.sqnr_db is not None and one.sqnr_db < 12 else "" for one in plain]
    assert "×" in data["mark"]
    _, _, same = heat([replace(plain[0], sqnr_db=-200.0, state="low"), *plain[1:]])
    assert (same.low, same.high, same.palette) == (colours.low, colours.high, colours.palette)


@pytest.mark.parametrize("blocks", [4, 40, 200])
def test_labels_of_many_layers_do_not_overlap(content: Content, blocks: int) -> None:
    """13 pixels for each: by layer as long as a phone can draw that, then by block."""
    one = cells(content)[0]
    names = ["stem", *(f"blocks.{block}.{layer}" for block in range(blocks) for layer in range(12))]
    plot, _, _ = heat([replace(one, layer=name) for name in names])
    rows = plot.height - 120
    assert rows <= max(4800, 4 * len(names)) and plot.yaxis[0].formatter.args["all"] == names
    labels = [place for place, text in enumerate(plot.yaxis[0].formatter.args["texts"]) if text]
    gaps = np.diff(labels) * rows / len(names)
    assert len(labels) == (len(names) if blocks == 4 else 1 + blocks) and gaps.min() >= 13
    shown = [plot.yaxis[0].formatter.args["texts"][place] for place in labels]
    assert shown[-1] == ("blocks.3.11" if blocks == 4 else f"blocks.{blocks - 1}")


@pytest.fixture(scope="module")
def seen(page: Path) -> dict[str, Any]:
    """What happened in the browser."""
    results = page.with_name("results.json")
    done = node(HOST / "report.mjs", CHROMIUM, results, page)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(results.read_bytes())
    return found


@needs_chromium
def test_the_browser_has_nothing_to_complain_about(seen: dict[str, Any], page: Path) -> None:
    assert seen["complaints"] == []
    assert set(seen["requests"]) == {page.as_uri()}


@needs_chromium
def test_the_clips_play_in_step_and_the_slider_moves_them(seen: dict[str, Any], content: Content) -> None:
    assert seen["plays"] and seen["pauses"] and seen["number"] == "2 of 3"
    assert seen["still"], "who wants no motion gets none"
    assert [len(canvases) for canvases in seen["frames"].values()] == [3 + 5, 3 + 5]
    for frame, canvases in seen["frames"].items():
        for pair, drawn in zip(content.clips, (canvases[:3], canvases[3:]), strict=True):
            for side, pixels in zip((pair.reference, pair.quantized), drawn, strict=False):
                assert pixels == side[int(frame), ..., 0].flatten().tolist()


@needs_chromium
def test_hovering_and_tapping_a_cell_gives_its_numbers(seen: dict[str, Any], content: Content) -> None:
    plan = content.bundle.plan
    layer = next(one for one in plan.layers if one.name.startswith("blocks"))
    assert content.verify is not None and layer.smoothing is not None
    quality = next(one for one in content.verify.layers if (one.layer, one.bin) == (layer.name, 1))
    span = layer.activation[1]
    for told in (seen["tooltip"], seen["cell"]):
        for said in (
            layer.name, "bin01", f"{quality.sqnr_db:.1f} dB", f"worst at t={quality.worst_step:g}", "W8 int8",
            f"{span.lo:.4g} … {span.hi:.4g}", f"{layer.smoothing.alpha:g}", "place", layer.smoothing_why,
        ):  # fmt: skip
            assert said in told, said


@needs_chromium
def test_the_ranges_are_those_of_the_chosen_layer(seen: dict[str, Any], made: Path, content: Content) -> None:
    """Every number of every layer that can be chosen."""
    report = RangesReport.from_json((made / "bundle" / RANGES).read_bytes())
    (network,) = report.networks
    plan = content.bundle.plan
    edges = sorted({t for one in plan.bins for t in one.t}, reverse=True)
    readers = {layer: value for value in network.values for layer in value.layers}
    assert list(seen["ranges"]) == list(readers) and len(readers) > 8
    for layer in plan.layers:
        if layer.name not in readers:
            continue
        shown, value = seen["ranges"][layer.name], readers[layer.name]
        plain = {"lo": value.after_lo or value.lo, "hi": value.after_hi or value.hi}
        columns = {"t": network.t, **plain, "raw_lo": value.lo, "raw_hi": value.hi}
        for branch in ("cond", "uncond"):
            slots = [number for number, one in enumerate(network.branch) if one == branch]
            assert shown[branch] == {name: [column[number] for number in slots] for name, column in columns.items()}
            assert shown[f"boxes-{branch}"]["lo"] == [], "the bins serve both branches"
        boxes = shown["boxes-any"]
        assert [*zip(boxes["left"], boxes["right"], strict=True)] == [one.t for one in plan.bins]
        assert [boxes["lo"], boxes["hi"]] == [[getattr(one, end) for one in layer.activation] for end in ("lo", "hi")]
        assert shown["edges"]["t"] == edges and shown["x"] == [edges[0], edges[-1]]
        assert shown["y"][0] < min(*value.lo, *plain["lo"], *boxes["lo"])
        assert shown["y"][1] > max(*value.hi, *plain["hi"], *boxes["hi"])


@needs_chromium
def test_dark_print_and_phone(seen: dict[str, Any]) -> None:
    assert seen["light"]["paper"] == "rgb(251, 251, 250)" and seen["light"]["filter"] == "none"
    assert seen["dark"]["paper"] == "rgb(20, 23, 26)" and "invert" in seen["dark"]["filter"]
    on_paper = {"paper": "rgb(255, 255, 255)", "filter": "none", "play": "none", "layer": "inline", "sticksOut": False}
    assert seen["print"] == on_paper and seen["light"]["layer"] == "none"
    assert seen["widest"] <= 390, "nothing sticks out on a phone"
