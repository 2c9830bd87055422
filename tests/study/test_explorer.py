"""The explorer's file: what is in it, and what is refused."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from explorer_material import NASTY, SIZE, noise_explorer

from ldm.study.report.explorer import MapPoint, write


class Tags(HTMLParser):
    """Every tag with its attributes, the text of title, and that of the data block."""

    def __init__(self, text):
        super().__init__()
        self.found, self.texts = [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found:
            tag, attributes = self.found[-1]
            self.texts.setdefault(attributes.get("id", tag), data)


def data_of(path):
    return json.loads(Tags(path.read_text(encoding="utf-8")).texts["data"])


# ---- the file ---------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_loads_nothing(page_path):
    text = page_path.read_text(encoding="utf-8")
    tags = Tags(text)
    assert [p.name for p in page_path.parent.iterdir()] == ["index.html"]  # nothing beside it, no partial file
    loads = [value for _, attributes in tags.found for key, value in attributes.items() if key in ("src", "href")]
    assert all(value.startswith("data:") for value in loads)
    addresses = set(re.findall(r"https?://[^\"'\s]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "@import" not in text
    policy = next(a["content"] for _, a in tags.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")  # and the browser holds it to that


def test_the_script_neither_evaluates_nor_parses_text(page_path):
    text = page_path.read_text(encoding="utf-8")
    assert not re.search(r"\beval\(|new Function|innerHTML|outerHTML|insertAdjacentHTML|document\.write", text)


def test_text_of_any_kind_arrives_as_it_was(page_path, explorer):
    tags = Tags(page_path.read_text(encoding="utf-8"))
    assert tags.texts["title"] == explorer.title
    assert [tag for tag, _ in tags.found].count("script") == 3  # the theme, the data, the page: none slipped in
    data = data_of(page_path)
    assert (data["title"], data["command"]) == (explorer.title, explorer.command)
    assert data["domains"][0]["neutralPrompt"] == NASTY


def test_the_data_say_what_was_given(page_path):
    data = data_of(page_path)
    chest = data["domains"][0]
    effusion = chest["patients"][0]["trajectories"][0]
    assert [f["label"] for f in effusion["frames"][:3]] == ["neutral", "u = 0.25", "s = 40"]
    assert effusion["target"] == 0
    assert chest["patients"][0]["trajectories"][1]["target"] == 1
    assert effusion["cosines"] == [[1, 0.5, None], [0.5, 1, -0.25], [None, -0.25, 1]]
    assert chest["map"][-1] == [None, "neutral", None, 3.0, 9.0]
    assert [p["trajectories"][0]["hasTruth"] for p in chest["patients"]] == [False, True]
    assert len(data["sprites"]) == 2 * 2 + 1 * 2  # one per trajectory
    assert {(s["width"], s["height"], s["columns"]) for s in data["sprites"]} == {(SIZE, SIZE, 3), (SIZE, SIZE, 3)}


def test_the_same_explorer_gives_the_same_bytes(page_path, explorer, tmp_path):
    write(explorer, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page_path.read_bytes()


def test_images_are_compressed_until_the_page_is_small_enough(tmp_path):
    explorer = noise_explorer(frames=16, size=64)  # 0.19 MiB at quality 90, 0.13 at 70, 0.09 at 3/4 of the size
    sizes, widths = [], []
    for limit in (15.0, 0.14, 0.1):
        write(explorer, tmp_path / "index.html", limit)
        sizes.append((tmp_path / "index.html").stat().st_size / 2**20)
        widths.append(data_of(tmp_path / "index.html")["sprites"][0]["width"])
        assert sizes[-1] <= limit
    assert sizes[0] > sizes[1] > sizes[2]
    assert widths == [64, 64, 48]


def test_a_page_that_cannot_fit_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"limit_mib: 1 trajectories do not fit into 0\.05 MiB.* leave out seeds"):
        write(noise_explorer(frames=16, size=64), tmp_path / "index.html", 0.05)
    assert list(tmp_path.iterdir()) == []


# ---- what is refused --------------------------------------------------------------------------------


def changed(explorer, **changes):
    """The first trajectory of the explorer with some fields replaced."""
    return dataclasses.replace(explorer.domains[0].patients[0].trajectories[0], **changes)


def test_a_trajectory_begins_with_neutral(explorer):
    frames = explorer.domains[0].patients[0].trajectories[0].frames
    with pytest.raises(ValueError, match=r"'pleural_effusion': frames must be one neutral, then"):
        changed(explorer, frames=frames[1:])
    with pytest.raises(ValueError, match="positions must ascend"):
        changed(explorer, frames=(frames[0], *frames[:0:-1]))


def test_images_of_other_sizes_are_refused(explorer):
    with pytest.raises(ValueError, match=r"images must be uint8 \(64, 64, 3\), got uint8 \(32, 64, 3\)"):
        changed(explorer, truth=np.zeros((32, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="got float64"):
        changed(explorer, truth=np.zeros((64, 64, 3)))


def test_cosines_and_heads_must_fit(explorer):
    with pytest.raises(ValueError, match=r"cosines must be \(3, 3\) for these swap steps, got \(2, 2\)"):
        changed(explorer, cosines=np.eye(2))
    with pytest.raises(ValueError, match=r"domain 'chest', seed 0, 'pleural_effusion': 2 probabilities in a frame"):
        dataclasses.replace(explorer.domains[0], heads=("one",))


def test_names_are_given_once_and_points_exist(explorer):
    chest = explorer.domains[0]
    with pytest.raises(ValueError, match="domains: expected each once"):
        dataclasses.replace(explorer, domains=(chest, chest))
    with pytest.raises(ValueError, match="patients: expected each once"):
        dataclasses.replace(chest, patients=chest.patients * 2)
    with pytest.raises(ValueError, match="a map point has seed 2, expected an index"):
        dataclasses.replace(chest, map=(MapPoint(2, "neutral", None, 0.0, 0.0),))
    with pytest.raises(ValueError, match="at least one patient"):
        dataclasses.replace(chest, patients=(), map=())
