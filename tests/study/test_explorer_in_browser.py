"""The explorer in a headless Chromium: what it does."""

import dataclasses
import shutil
import time

import numpy as np
import pytest
from explorer_material import NASTY, noise_explorer

from ldm.study.report.explorer import Explorer, write

ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("neither chromium nor google-chrome is installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, page_path):
    """Open the page from disk; at the end of the test its console must have been silent, and the network too."""
    contexts, complaints = [], []

    def open_(address="", path=page_path, **settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)  # only a page that hangs is to fail, not a busy machine
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda r: complaints.append(r.url) if not r.url.startswith(("data:", path.as_uri())) else None
        )
        page.goto(path.as_uri() + address)
        until(page, "document.querySelector('#image').width !== 300")  # the width of an empty canvas
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


def until(page, expression):
    """Wait for a condition. Playwright's own wait evaluates in the page, which the page's policy forbids."""
    deadline = time.monotonic() + 120
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"still not: {expression}"
        page.wait_for_timeout(20)


def pixels(page, canvas="image"):
    """(H, W, 3) of what a canvas shows."""
    values = page.evaluate(
        """(id) => { const c = document.getElementById(id);
           return [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]; }""",
        canvas,
    )
    width, height, flat = values
    return np.array(flat, np.uint8).reshape(height, width, 4)[:, :, :3]


def marker(page, chart="#probabilities"):
    return page.locator(f"{chart} .marker").get_attribute("transform")


def box_in_view(page, selector):
    page.locator(selector).scroll_into_view_if_needed()
    return page.locator(selector).bounding_box()


def choose(page, group, label):
    page.locator(f"#{group} label").filter(has_text=label).click()


def chosen(page, group):
    return page.evaluate("(id) => document.querySelector(`#${id} input:checked`).value", group)


def test_the_keyboard_moves_image_marker_and_numbers(open_page, explorer):
    page = open_page("#chest/pleural_effusion/0/0")
    frames = explorer.domains[0].patients[0].trajectories[0].frames
    curve = [f for f in frames if f.kind in ("neutral", "curve")]
    # WebP at quality 90 changes a pixel by a few grey levels; the edit changes hundreds of them by 50 and more.
    assert np.abs(pixels(page).astype(int) - frames[0].image).mean() < 4
    before = marker(page)
    page.locator("#slider").focus()
    page.keyboard.press("End")
    assert page.locator("#label").text_content() == "u = 1.00"
    assert page.locator("#slider").get_attribute("aria-valuetext") == "u = 1.00, Pleural effusion 1.00"
    assert np.abs(pixels(page).astype(int) - curve[-1].image).mean() < 4
    assert np.abs(pixels(page).astype(int) - frames[0].image).max() > 40
    assert marker(page) != before
    page.keyboard.press("ArrowLeft")
    assert page.locator("#label").text_content() == "u = 0.75"
    assert page.locator("#heads li.target .value").text_content() == "0.75"
    assert page.locator("#lpips .value").text_content() == "0.150"
    assert page.locator("#ssim .value").text_content() == "0.925"
    assert "u = 0.75" in page.locator("#image").get_attribute("aria-label")


@pytest.mark.parametrize("button", ["#play", "#theme", "#copy"])
def test_the_arrow_keys_move_after_any_button_was_pressed(open_page, button):
    page = open_page("#chest/pleural_effusion/0/0", permissions=["clipboard-read", "clipboard-write"])
    page.locator(button).click()
    for _ in range(5):  # the first one stops what plays
        page.keyboard.press("ArrowRight")
    assert page.locator("#label").text_content() == "u = 1.00"
    assert page.locator("#play").inner_text() == "Play"
    page.keyboard.press("ArrowLeft")
    assert page.locator("#label").text_content() == "u = 0.75"


def test_the_arrow_keys_are_left_to_what_uses_them_itself(open_page):
    page = open_page("#chest/pleural_effusion/0/5", viewport={"width": 320, "height": 812})
    page.locator("#slider").press("ArrowLeft")
    assert page.locator("#label").text_content() == "u = 0.50"  # one step, not the slider's and another
    table = page.locator("#summary .scroll")
    table.press("ArrowRight")  # fits: nothing to scroll
    assert page.locator("#label").text_content() == "u = 0.75"
    page.locator("#summary table").evaluate("(table) => { table.style.width = '900px'; }")
    table.press("ArrowLeft")
    page.locator("#latents .point[tabindex='0']").press("ArrowUp")
    page.locator("#attributes input:checked").press("ArrowRight")
    assert page.locator("#label").text_content() == "u = 0.75"
    assert chosen(page, "attributes") == "support_devices"


def test_the_difference_is_white_red_and_blue(open_page):
    page = open_page("#chest/support_devices/rendered-7/3")
    image, change = pixels(page).astype(float), pixels(page, "change").astype(int)
    page.locator("#slider").press("Home")
    neutral = pixels(page).astype(float)
    assert (pixels(page, "change") == 255).all()  # neutral against itself
    expected = np.clip(2 * (image - neutral).mean(axis=2), -255, 255)
    assert expected.max() > 100  # the metal is brighter than what it covers
    # red falls where darker, blue where brighter, green with both; rounding costs at most one level
    assert np.abs(change[..., 0] - (255 - np.maximum(-expected, 0))).max() <= 1
    assert np.abs(change[..., 1] - (255 - np.abs(expected))).max() <= 1
    assert np.abs(change[..., 2] - (255 - np.maximum(expected, 0))).max() <= 1


def test_the_mouse_drags_slider_image_and_chart(open_page):
    page = open_page("#chest/pleural_effusion/0/0")
    for selector in ("#slider", "#image", "#probabilities", "#strip"):
        box = box_in_view(page, selector)
        y = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + 0.3 * box["width"], y)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.02 * box["width"], y, steps=3)
        assert page.locator("#label").text_content() == "neutral", selector
        before, image = marker(page), pixels(page)
        page.mouse.move(box["x"] + 0.98 * box["width"], y, steps=3)
        page.mouse.up()
        assert page.locator("#label").text_content() == "u = 1.00", selector
        assert marker(page) != before
        assert np.abs(pixels(page).astype(int) - image).max() > 40


def test_a_finger_drags(open_page):
    page = open_page("#chest/pleural_effusion/0/0", has_touch=True, viewport={"width": 375, "height": 812})
    box = box_in_view(page, "#strip")
    page.touchscreen.tap(box["x"] + 0.9 * box["width"], box["y"] + 10)
    assert page.locator("#label").text_content() == "u = 1.00"


def test_domain_attribute_patient_and_path_can_be_chosen(open_page):
    page = open_page("#chest/pleural_effusion/0/0")
    assert page.locator("#known").is_hidden()
    assert page.locator("#domain-note").is_hidden()
    choose(page, "attributes", "Support devices")
    assert chosen(page, "attributes") == "support_devices"
    assert page.locator("#heads li.target").inner_text().startswith("Support devices")
    choose(page, "paths", "Swaps")
    page.keyboard.press("ArrowRight")  # the focus is in the path's own radio group: on to the curve
    assert chosen(page, "paths") == "curve"
    first = pixels(page)
    choose(page, "patients", "7")
    until(page, "!document.querySelector('#known').hidden")
    until(page, "document.querySelector('#truth').width !== 300")
    assert page.locator("#where").text_content() == "rendered 7"
    assert (pixels(page) != first).any()
    choose(page, "domains", "The skin")
    assert chosen(page, "attributes") == "hair"
    assert page.locator("#known").is_hidden()
    assert page.locator("#summary th[scope=row]").all_inner_texts() == ["Hair", "Ink"]
    assert page.locator("#domain-note").text_content() == f"Real; credit: {NASTY}"
    until(page, "location.hash.startsWith('#skin/hair/3/')")


def test_truth_is_shown_beside_the_last_swap(open_page, explorer):
    page = open_page("#chest/support_devices/rendered-7/3")
    truth = explorer.domains[0].patients[1].trajectories[1].truth
    assert np.abs(pixels(page, "truth").astype(int) - truth).mean() < 4  # WebP, as above
    assert pixels(page, "error").mean() > 245  # the last frame is the truth but for WebP's loss: nearly all white
    assert "True counterfactual" in page.locator("#truth").get_attribute("aria-label")


def test_the_map_selects_by_click_and_by_keyboard(open_page):
    page = open_page("#chest/pleural_effusion/0/0")
    points = page.locator("#latents .point")
    assert points.count() == 4  # that of the seed which is not shown is no button
    points.nth(3).click()  # patient 7, support devices, s = 20
    assert page.locator("#where").text_content() == "rendered 7"
    assert chosen(page, "attributes") == "support_devices"
    assert page.locator("#label").text_content() == "s = 20"
    page.keyboard.press("ArrowLeft")  # to patient 0's point
    page.keyboard.press("Enter")
    assert page.locator("#where").text_content() == "generated 0"
    assert page.locator("#label").text_content() == "s = 20"


def test_cosines_are_written_out_and_the_current_step_is_marked(open_page):
    page = open_page("#chest/pleural_effusion/0/2")
    texts = page.locator("#directions text").all_text_contents()
    assert texts.count("1.00") == 3
    assert texts.count("\u2013") == 2  # undefined
    assert texts.count("-0.25") == 2
    assert page.locator("#directions .here").evaluate("(node) => node.style.visibility") == "visible"


def test_theme_follows_the_system_and_the_button(open_page):
    page = open_page(color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.locator("#theme").click()
    light = page.evaluate(background)
    assert dark != light
    page.reload()
    until(page, f"{background} === '{light}'")  # the choice is remembered


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_play_runs_to_the_end_and_can_be_stopped(open_page, motion):
    page = open_page("#chest/pleural_effusion/0/0", reduced_motion=motion)
    page.locator("#play").click()
    assert page.locator("#play").inner_text() == "Pause"  # for seconds
    page.locator("#play").click()
    assert page.locator("#play").inner_text() == "Play"
    assert page.locator("#label").text_content() != "u = 1.00"
    page.evaluate("location.hash = '#chest/pleural_effusion/0/5'")  # u = 0.75, a second before the end
    until(page, "document.querySelector('#label').textContent === 'u = 0.75'")
    page.locator("#play").click()
    until(page, "document.querySelector('#play').innerText === 'Play'")
    assert page.locator("#label").text_content() == "u = 1.00"


def test_an_address_opens_a_view_and_a_wrong_one_does_no_harm(open_page):
    page = open_page("#skin/ink/3/4")
    assert (chosen(page, "domains"), chosen(page, "attributes")) == ("1", "ink")
    label = page.locator("#label").text_content()
    page.evaluate("location.hash = '#chest/support_devices/rendered-7/1'")
    until(page, "document.querySelector('#where').textContent === 'rendered 7'")
    assert page.locator("#label").text_content() == "s = 40" != label
    for wrong in ("#chest/nothing/99/99999", "#%E0%A4%A"):
        assert open_page(wrong).locator("#where").text_content() == "generated 0"


def test_nothing_is_wider_than_the_window(open_page):
    page = open_page("#chest/pleural_effusion/0/0", viewport={"width": 375, "height": 812})
    for width in (375, 360, 320, 760, 1100, 375):
        page.set_viewport_size({"width": width, "height": 812})
        until(page, f"document.querySelector('#probabilities svg').clientWidth < {width}")  # it was drawn anew
        for patient in ("0", "7"):  # without and with the truth
            choose(page, "patients", patient)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            for left, right in (("#image", "#change"), ("#truth", "#error"))[: 1 + (patient == "7")]:
                tops = [page.locator(each).bounding_box()["y"] for each in (left, right)]
                assert abs(tops[0] - tops[1]) < 0.1  # however many lines their captions take; layouts round to 1/64 px


def with_a_long_word(domain, word):
    """The domain with a word without spaces in every text that comes from outside."""
    patients = tuple(
        dataclasses.replace(
            patient,
            title=f"{patient.kind} {word}",
            trajectories=tuple(dataclasses.replace(t, title=t.title + word, prompt=word) for t in patient.trajectories),
        )
        for patient in domain.patients
    )
    return dataclasses.replace(
        domain,
        title=word,
        neutral_prompt=word,
        heads=tuple(head + word for head in domain.heads),
        patients=patients,
        summary=[(title + word, metrics) for title, metrics in domain.summary],
    )


def test_a_word_of_300_letters_is_broken(open_page, explorer, tmp_path):
    word = "w" * 300
    domains = tuple(with_a_long_word(domain, word) for domain in explorer.domains)
    path = tmp_path / "long.html"
    write(Explorer(f"Trajectories {word}", f"ldm evaluate {word}", word, domains), path)
    for width in (360, 1280):
        page = open_page("#chest/support_devices/0/3", path=path, viewport={"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        # Whatever is wider than its box would be cut off: nothing but what can be scrolled may be.
        wide = """[...document.querySelectorAll('main *, header *')].filter((node) => !node.closest('.faces, .unseen')
            && node.getBoundingClientRect().right > document.documentElement.clientWidth).map((node) => node.tagName)"""
        assert set(page.evaluate(wide)) <= {"TABLE", "THEAD", "TBODY", "TR", "TH", "TD"}
        name, table = box_in_view(page, "#summary tbody th >> nth=0"), box_in_view(page, "#summary .scroll")
        assert 100 < name["width"] < 0.6 * table["width"]  # leaves room for the figures, and is no tower of letters


def test_texts_are_shown_as_written_and_the_command_can_be_copied(open_page, explorer):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    assert page.locator("h1").text_content() == explorer.title
    assert page.locator("#neutral-prompt").text_content() == NASTY
    assert page.locator("#command").text_content() == explorer.command
    page.locator("#copy").click()
    until(page, "document.querySelector('#copy').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == explorer.command


def test_a_page_without_classifier_distances_map_and_table_says_so(open_page, tmp_path):
    write(noise_explorer(frames=4, size=32), tmp_path / "bare.html")
    page = open_page(path=tmp_path / "bare.html")
    assert "No classifier" in page.locator("#probabilities").inner_text()
    unmeasured = page.locator("#unmeasured").inner_text()
    assert "LPIPS was not measured" in unmeasured
    assert "ldm evaluate --fetch" in unmeasured  # how to get it
    for absent in ("#lpips", "#ssim", "#directions", "#latents", "#summary", "#known", "#paths", "#domains"):
        assert page.locator(absent).is_hidden(), absent
