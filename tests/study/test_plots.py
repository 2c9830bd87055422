"""Figures: they hold what they must, nothing is cut off or overlaps, and the same input gives the same files."""

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from made_up_material import made_up_material
from made_up_results import SWAP_STEPS, made_up_results
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from ldm.study.metrics.cfrt import cfrt
from ldm.study.report import plots
from ldm.study.report.charts import _cosine
from ldm.study.report.image_figures import evenly
from ldm.study.report.latent_map import MAX_THUMBNAILS, beside, spread_out
from ldm.study.report.plot_style import COLUMN_WIDTH, PAGE_WIDTH, looks, save_figure
from ldm.study.report.plots import FigureImages, LatentMap, NothingToDraw, tsne
from ldm.study.report.results import attributes

TITLES = ["Chest X-ray", "Melanoma", "Melanocytic nevus"]
SHORT = {"Chest X-ray": "Chest X-ray", "Melanoma": "Melanoma", "Melanocytic nevus": "Nevus"}
OVER_STEPS = [str(s) for s in SWAP_STEPS[::-1]]


@pytest.fixture(scope="module")
def results():
    return made_up_results()


@pytest.fixture(scope="module")
def material():
    return made_up_material(seeds=2, map_seeds=6)


@pytest.fixture(scope="module")
def figures(results, material):
    """Every kind of figure, drawn once."""
    return {
        "figure_1": plots.figure_1(results, material),
        "figure_3": plots.figure_3(results, material),
        "figure_3 of a cell": plots.figure_3(results, material, "chest", seeds=2, change=True),
        "figure_4": plots.figure_4(results, material),
        "figure_5": plots.figure_5(results),
        "figure_5 of a cell": plots.figure_5(results, "chest"),
        "figure_6": plots.figure_6(results, material),
        "figure_cfrt": plots.figure_cfrt(results),
        "figure_truth": plots.figure_truth(results),
        "figure_methods": plots.figure_methods(results),
    }


NAMES = [
    *("figure_1", "figure_3", "figure_3 of a cell", "figure_4", "figure_5", "figure_5 of a cell", "figure_6"),
    *("figure_cfrt", "figure_truth", "figure_methods"),
]


def words(figure):
    """Every text of a figure that is seen; the labels of ticks beyond an axis's ends are not."""
    beyond = set()
    for axes in figure.axes:
        for i, axis in enumerate((axes.xaxis, axes.yaxis)):
            low, high = sorted(axis.get_view_interval())
            beyond |= {label for label in axis.get_ticklabels() if not low <= label.get_position()[i] <= high}
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in beyond]


def said(figure):
    return {text.get_text() for text in words(figure)}


# ---- every figure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_fits_its_column_and_nothing_is_cut_off(name, figures):
    figure = figures[name]
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    assert width in (COLUMN_WIDTH, PAGE_WIDTH)
    assert height <= 9.5  # what a page holds beside a caption
    box = figure.get_tightbbox()
    pixel = 1 / figure.dpi  # anti-aliased edges may touch the next pixel
    assert box.x0 >= -pixel
    assert box.y0 >= -pixel
    assert box.x1 <= width + pixel
    assert box.y1 <= height + pixel


@pytest.mark.parametrize("name", NAMES)
def test_words_are_legible_and_do_not_overlap(name, figures):
    figure = figures[name]
    figure.draw_without_rendering()
    texts = words(figure)
    smallest = 5.0 if name.startswith("figure_5") else 7.0  # the values in the squares of a matrix
    assert min(text.get_fontsize() for text in texts) >= smallest
    boxes = np.array([text.get_window_extent().extents for text in texts])
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    shared = np.minimum(high, high.swapaxes(0, 1)) - np.maximum(low, low.swapaxes(0, 1))
    overlap = np.triu(shared.min(axis=2) > 1, k=1)  # more than a pixel both ways
    assert [(texts[a].get_text(), texts[b].get_text()) for a, b in np.argwhere(overlap)] == []


def test_drawing_leaves_matplotlib_as_it_was(results):
    before = dict(matplotlib.rcParams)
    plots.figure_cfrt(results)
    assert dict(matplotlib.rcParams) == before


def test_attributes_look_the_same_in_all_cells_and_differ_from_each_other(results):
    known = looks(results)
    assert list(known) == ["pleural_effusion", "support_devices", "hair", "gel_bubble", "ruler", "ink"]
    assert len({look.colour for look in known.values()}) == len({look.marker for look in known.values()}) == 6


# ---- figures of images -----------------------------------------------------------------------------


def test_figure_1_has_one_start_a_cell_and_a_strip_an_attribute(figures):
    assert len(figures["figure_1"].axes[0].images) == 3 + 10 * 4
    assert {*SHORT.values(), "Pleural effusion →", "Ink →"} <= said(figures["figure_1"])


def test_figure_3_has_a_row_an_attribute_and_a_column_a_swap_step(figures, material):
    figure = figures["figure_3"]
    images = figure.axes[0].images
    assert len(images) == 10 * 10
    assert {*TITLES, "neutral", *(f"s = {s}" for s in SWAP_STEPS)} <= said(figure)
    np.testing.assert_array_equal(images[0].get_array(), material.rows["chest"][0]["pleural_effusion"][0][1])
    np.testing.assert_array_equal(images[-1].get_array(), material.rows["nv"][0]["ink"][-1][1])
    extents = np.array([image.get_extent() for image in images])  # left, right, bottom, top in inches
    np.testing.assert_allclose(extents[:, 1] - extents[:, 0], extents[:, 2] - extents[:, 3])  # square
    assert (np.diff(extents[:10, 0]) > 0).all()  # to the right along a row


def test_figure_3_of_a_cell_names_its_seeds_and_shows_the_change(figures):
    figure = figures["figure_3 of a cell"]
    assert len(figure.axes[0].images) == 2 * 2 * (10 + 9)  # no change is drawn of neutral against itself
    assert {"Pleural\neffusion\nseed 0", "Support\ndevices\nseed 1", "change"} <= said(figure)


def test_figure_6_goes_from_u_0_to_u_1(figures):
    assert len(figures["figure_6"].axes[0].images) == 10 * 9
    assert {"u = 0.00", "u = 0.50", "u = 1.00"} <= said(figures["figure_6"])


def test_evenly_keeps_both_ends():
    strip = [(str(i), None) for i in range(50)]
    assert [label for label, _ in evenly(strip, 5)] == ["0", "12", "24", "37", "49"]
    assert evenly(strip[:3], 5) == strip[:3]


# ---- the map ---------------------------------------------------------------------------------------


def test_tsne_keeps_two_clusters_apart_and_repeats_itself():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((40, 16)).astype(np.float32)
    latents[20:] += 30
    first = tsne(latents)
    assert first.shape == (40, 2)
    np.testing.assert_array_equal(first, tsne(latents))
    middles = first[:20].mean(axis=0), first[20:].mean(axis=0)
    nearest = [np.argmin([np.linalg.norm(point - middle) for middle in middles]) for point in first]
    assert nearest == [0] * 20 + [1] * 20


@pytest.mark.parametrize(
    ("latents", "complaint"),
    [
        (np.zeros((3, 8)), "M >= 4"),
        (np.zeros((5, 4, 2, 2)), "flatten"),
        (np.array([[1.0, 2.0]] * 4 + [[np.nan, 0.0]]), "row 4"),
    ],
)
def test_tsne_says_what_is_wrong(latents, complaint):
    with pytest.raises(ValueError, match=complaint):
        tsne(latents)


def test_tsne_takes_as_few_points_as_it_says():
    assert np.isfinite(tsne(np.eye(4))).all()


def test_figure_4_shows_every_point_in_its_colour(figures, material, results):
    figure = figures["figure_4"]
    assert [axes.get_title() for axes in figure.axes] == TITLES
    assert {(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes} == {("t-SNE 1", "t-SNE 2")}
    chest = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    names = list(dict.fromkeys(material.tsne["chest"].attribute))
    assert names == ["neutral", "pleural_effusion", "support_devices"]
    assert [len(c.get_offsets()) for c in chest] == [54, 54, 6]  # neutral last, over the swaps that hardly moved
    colours = [to_hex(c.get_facecolor()[0]).upper() for c in chest]
    assert colours[:2] == [looks(results)[name].colour for name in names[1:]]
    sizes = chest[0].get_sizes()  # of one seed's swaps, s = 5 first
    assert (np.diff(sizes[:9]) < 0).all()


def test_neutral_has_a_dark_rim_and_is_larger_than_the_swaps(figures):
    *swaps, neutral = [c for c in figures["figure_4"].axes[0].collections if isinstance(c, PathCollection)]
    assert to_hex(neutral.get_edgecolor()[0]) == "#000000"
    assert neutral.get_linewidth() > 0
    assert neutral.get_sizes().min() > max(c.get_sizes().max() for c in swaps)
    (mark,) = [mark for mark in figures["figure_4"].legends[0].legend_handles if mark.get_label() == "Neutral"]
    assert mark.get_markeredgecolor() == "black"


def test_thumbnails_never_overlap(figures):
    for axes in figures["figure_4"].axes:
        boxes = [image.get_extent() for image in axes.images]
        assert 1 < len(boxes) <= MAX_THUMBNAILS
        for a, b in combinations(boxes, 2):
            assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]


def test_thumbnails_are_tied_to_their_points_and_beside_them(figures, material):
    for axes, cell in zip(figures["figure_4"].axes, ("chest", "mel", "nv"), strict=True):
        points = {tuple(point) for point in material.tsne[cell].points}
        assert len(axes.lines) == len(axes.images)
        for line, image in zip(axes.lines, axes.images, strict=True):
            (x, y), (x_end, y_end) = line.get_xydata()
            left, right, bottom, top = image.get_extent()
            assert (x, y) in points
            assert not (left <= x <= right and bottom <= y <= top)
            assert left <= x_end <= right
            assert bottom <= y_end <= top


def test_which_points_get_a_thumbnail_by_hand():
    points = np.array([[0.0, 0.0], [0.05, 0.0], [0.9, 0.0], [5.0, 0.0], [-0.8, 0.1]])
    # Of all but 3: 2 is the farthest from the middle, 4 from 2, 1 from both; that leaves no room for 0.
    assert spread_out(points, [0, 1, 2, 4], apart=0.3, middle=np.zeros(2)) == [2, 4, 1]


def test_a_thumbnail_goes_where_it_hides_nothing():
    x, y = np.meshgrid(np.linspace(-0.9, 0.9, 19), np.linspace(-0.9, 0.0, 10))
    points = np.stack([x.ravel(), y.ravel()], axis=1)  # the lower half is full, the upper one empty
    above = int(np.flatnonzero((points == [0.0, 0.0]).all(axis=1))[0])
    corner = beside(points, [above], side=0.2, middle=np.zeros(2), reach=1.0)[above]
    assert corner[1] > 0
    assert np.abs(corner + 0.1 - points[above]).max() < 0.3  # and near its point


def test_a_thumbnail_without_room_is_left_out():
    assert beside(np.zeros((1, 2)), [0], side=1.9, middle=np.zeros(2), reach=1.0) == {}


def test_a_map_of_one_point_is_drawn(results):
    one = LatentMap(np.zeros((1, 2)), ["neutral"], [None], [0])
    assert len(plots.figure_4(results, FigureImages(tsne={"chest": one})).axes) == 1


# ---- figures of numbers ----------------------------------------------------------------------------


def test_figure_5_has_a_panel_an_attribute_and_one_colour_bar(figures, results):
    figure = figures["figure_5"]
    *panels, bar = figure.axes
    assert len(panels) == 10
    assert panels[0].get_title() == "Chest X-ray: pleural effusion"
    assert bar.get_xlabel().startswith("cosine")
    for panel in panels:
        assert (panel.get_xlabel(), panel.get_ylabel()) == ("swap step s", "swap step s")
        assert [tick.get_text() for tick in panel.get_xticklabels()] == OVER_STEPS
        assert panel.images[0].get_clim() == (-1, 1)
    matrix = np.array(results["cells"]["chest"]["attributes"]["pleural_effusion"]["directions"]["matrix"])
    np.testing.assert_array_equal(panels[0].images[0].get_array(), matrix[::-1, ::-1])
    values = [text.get_text() for text in panels[0].texts]
    assert values == [_cosine(value) for value in matrix[::-1, ::-1].ravel()]


def test_cosines_as_written():
    written = [_cosine(x) for x in (1.0, 0.996, 0.5, 0.0, -0.001, -0.25, -1.0, float("nan"))]
    assert written == ["1", "1", ".50", ".00", ".00", "\N{MINUS SIGN}.25", "\N{MINUS SIGN}1", "-"]


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("figure_cfrt", ["CFRT (own head)", "CFRT (strict)", "flip rate"]),
        ("figure_truth", ["skill", "leakage", "identity\nretrieval@1"]),
    ],
)
def test_curves_over_the_swap_step_run_towards_the_stronger_edit(name, labels, figures):
    panels = np.reshape(figures[name].axes, (3, 3))
    assert [row[0].get_ylabel() for row in panels] == labels
    assert [axes.get_title() for axes in panels[0]] == TITLES
    assert {axes.get_xlabel() for axes in panels[-1]} == {"swap step s"}
    for axes in panels.ravel():
        assert axes.xaxis_inverted()
    assert "Pleural effusion" in said(figures[name])


def test_curves_hold_the_values(figures, results):
    per_step = results["cells"]["chest"]["attributes"]["pleural_effusion"]["swaps"]["per_swap_step"]
    line = figures["figure_cfrt"].axes[0].lines[0]
    assert line.get_ydata().tolist() == per_step["own_head_signed"]
    assert line.get_xdata().tolist() == SWAP_STEPS


def test_each_floor_is_a_line_of_its_own_kind(figures, results):
    truth = results["cells"]["chest"]["attributes"]["pleural_effusion"]["truth"]
    for row, name, style in ((0, "skill", "--"), (1, "leakage", "--"), (2, "retrieval", "-.")):
        lines = figures["figure_truth"].axes[3 * row].lines
        assert {line.get_ydata()[0] for line in lines if line.get_linestyle() == style} == {truth["floor"][name]}
    assert {"autoencoder's floor", "inversion's floor"} <= said(figures["figure_truth"])


def test_a_floor_that_was_not_measured_is_not_in_the_legend():
    results = made_up_results()
    for a in attributes(results):
        del a.scores["truth"]["floor"]["retrieval"]
    words_of_it = said(plots.figure_truth(results))
    assert "autoencoder's floor" in words_of_it
    assert "inversion's floor" not in words_of_it


def test_an_axis_grows_for_values_out_of_the_usual():
    results = made_up_results()
    results["cells"]["chest"]["attributes"]["pleural_effusion"]["truth"]["per_swap_step"]["skill"][0] = -2.5
    assert plots.figure_truth(results).axes[0].get_ylim()[0] < -2.5


def test_an_axis_grows_for_intervals_and_floors(figures):
    lowest = figures["figure_truth"].axes[6].get_ylim()[0]
    assert lowest < 0.6  # where the made-up intervals of retrieval begin
    results = made_up_results()
    results["cells"]["nv"]["attributes"]["ink"]["truth"]["floor"]["retrieval"] = 0.2
    assert plots.figure_truth(results).axes[6].get_ylim()[0] < 0.2


def test_intervals_over_the_swap_steps_are_bands(figures, results):
    panels = np.reshape(figures["figure_cfrt"].axes, (3, 3))
    assert [[len(axes.collections) for axes in row] for row in panels] == [[2, 4, 4]] * 3
    interval = results["cells"]["chest"]["attributes"]["pleural_effusion"]["swaps"]["per_swap_step"]["interval"]
    outline = panels[2, 0].collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in outline} >= {(SWAP_STEPS[0], end) for end in interval["flip_rate"][0]}


def test_what_cfrt_writes_is_drawn_with_bands():
    rng = np.random.default_rng(0)
    found = cfrt(rng.random((30, 2)), rng.random((30, 2, 3, 2)), ["a", "b"], ["a", "b"], swap_steps=[5, 10, 15])
    written = {"cells": {"c": {"title": "C", "attributes": {name: {"swaps": of} for name, of in found.items()}}}}
    assert [len(axes.collections) for axes in plots.figure_cfrt(written).axes] == [2, 2, 2]


def test_without_an_interval_there_is_no_band():
    results = made_up_results()
    del results["cells"]["chest"]["attributes"]["pleural_effusion"]["swaps"]["per_swap_step"]["interval"]
    panels = np.reshape(plots.figure_cfrt(results).axes, (3, 3))
    assert [len(axes.collections) for axes in panels[:, 0]] == [1, 1, 1]


def test_figure_methods_has_every_method_and_its_seeds(figures):
    panels = np.reshape(figures["figure_methods"].axes, (3, 3))
    methods = [tick.get_text() for tick in panels[0, 0].get_yticklabels()]
    assert methods[:3] == ["prompt swaps, n = 200", "Bezier curve, n = 200", "linear direction, n = 8"]
    assert len(methods) == 7
    assert [axes.get_xlabel() for axes in panels[-1]] == ["CFRT (own head)", "CFRT (strict)", "flip rate"]
    assert [row[0].get_ylabel() for row in panels] == TITLES


def test_seeds_that_differ_are_a_span():
    results = made_up_results()
    chord = results["cells"]["nv"]["attributes"]["ink"]["baselines"]["chord"]
    chord["cfrt"]["own_head_signed"]["n"] = 5
    for a in attributes(results):
        a.scores["baselines"]["ramp_blend"]["cfrt"]["own_head_signed"]["n"] = None
    methods = [tick.get_text() for tick in plots.figure_methods(results).axes[0].get_yticklabels()]
    assert methods[3] == "straight chord, n = 5-8"
    assert "ramped blend" in methods


# ---- what is missing -------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [plots.figure_5, plots.figure_cfrt, plots.figure_truth, plots.figure_methods])
def test_nothing_to_draw_is_said(draw):
    with pytest.raises(NothingToDraw, match="results"):
        draw({})


@pytest.mark.parametrize("draw", [plots.figure_1, plots.figure_3, plots.figure_4, plots.figure_6])
def test_no_material_is_said(draw, results):
    with pytest.raises(NothingToDraw, match="pictures"):
        draw(results, FigureImages())


def test_nulls_leave_gaps():
    results = made_up_results()
    first = results["cells"]["chest"]["attributes"]["pleural_effusion"]
    first["directions"]["matrix"][0][1] = None
    first["swaps"]["per_swap_step"]["flip_rate"] = None
    first["truth"] = None
    first["baselines"]["chord"]["cfrt"]["strict"] = {"value": None, "interval": None}
    assert "-" in {text.get_text() for text in plots.figure_5(results, "chest").axes[0].texts}
    for draw in (plots.figure_cfrt, plots.figure_truth, plots.figure_methods):
        draw(results).draw_without_rendering()


# ---- files -----------------------------------------------------------------------------------------


def test_files_are_the_same_each_time_and_carry_their_fonts(results, tmp_path):
    """In another process, since sets of glyphs come in another order there."""
    here = save_figure(plots.figure_5(results, "chest"), tmp_path / "here")
    script = (
        "import sys; from pathlib import Path; from made_up_results import made_up_results;"
        "from ldm.study.report import plots; from ldm.study.report.plot_style import save_figure;"
        "save_figure(plots.figure_5(made_up_results(), 'chest'), Path(sys.argv[1]))"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "there")], env=environment, check=True, timeout=600)
    for file in here:
        assert file.read_bytes() == (tmp_path / f"there{file.suffix}").read_bytes()
    pdf = (tmp_path / "here.pdf").read_bytes()
    assert b"/FontFile2" in pdf  # TrueType, embedded
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf
    with Image.open(tmp_path / "here.png") as image:
        assert image.width == int(PAGE_WIDTH * 300)


def test_write_figures_writes_what_there_is(results, material, tmp_path, caplog):
    chest = {"cells": {"chest": {**results["cells"]["chest"]}}}
    first = chest["cells"]["chest"]["attributes"]["pleural_effusion"]
    chest["cells"]["chest"]["attributes"] = {"pleural_effusion": {**first, "truth": None, "baselines": None}}
    caplog.set_level("INFO")
    written = plots.write_figures(chest, FigureImages(rows={"chest": material.rows["chest"]}), tmp_path)
    names = ["figure_1", "figure_3", "figure_5", "figure_cfrt", "figure_3_chest", "figure_5_chest"]
    assert [path.name for path in written] == [f"{name}.{ending}" for name in names for ending in ("png", "pdf")]
    assert sorted((tmp_path / "figures").iterdir()) == sorted(written)  # no partial file is left
    assert "figure_4: not drawn" in caplog.text
