"""The demo's page in a real browser: make, compare, cancel, share, wait in line, and every mistake as a sentence."""

import json
import threading
import time
import urllib.parse

import pytest
from browser import chromium, console_errors, overflow, requested
from test_demo import GENERATION
from tiny import tiny_pipeline

pytest.importorskip("gradio", reason="demo: gradio is not installed (pip install 'diffaccel[demo]')")

from diffaccel.accel import active_run
from diffaccel.demo.asked import Limits
from diffaccel.demo.desk import Desk
from diffaccel.demo.models import Models
from diffaccel.demo.server import build_server, listen

pytestmark = pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting'")  # of pandas, in Gradio's queue

HOSTILE = '"><img src=x onerror="window.hit=1"><script>window.hit=2</script>'


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Address and desk of a server that offers a tiny video model and the bundled language model."""
    import uvicorn

    root = tmp_path_factory.mktemp("demo")
    pipe = tiny_pipeline()
    pipe.register_to_config(frames_per_block=1)
    pipe.save_pretrained(root / "causal")
    (root / "causal" / "generation.json").write_text(json.dumps(GENERATION))
    desk = Desk(Models([str(root / "causal")], limits=Limits(frames=4001)), root / "out")
    with listen("127.0.0.1", 0) as sock:
        server = uvicorn.Server(uvicorn.Config(build_server(desk), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/", desk
        server.should_exit = True
        desk.close()
        thread.join()
        desk.models.close()


@pytest.fixture(scope="module")
def browser(site):
    with chromium() as page:
        yield page


@pytest.fixture
def page(browser, site):
    """The page, loaded anew, its prompt filled in."""
    load(browser, site[0])
    fill(browser, "prompt", "a red circle")
    yield browser
    assert not console_errors(browser)
    browser.get("about:blank")


# -- what a reader does ------------------------------------------------------------------------------------------------


def until(what, seconds=30):
    """What `what()` gives, once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
    return found


def load(page, address):
    page.get(address)
    until(lambda: page.execute_script("return Boolean(document.querySelector('.da [data-da=status]'))"))
    until(lambda: field(page, "prompt").is_enabled())


def field(page, label):
    """The visible input of that label."""
    script = """
        for (const text of document.querySelectorAll('[data-testid=block-info]')) {
            if (text.textContent.trim() !== arguments[0]) continue;
            const found = text.closest('.block').querySelector('textarea, input');
            if (found && found.offsetParent) return found;
        }"""
    return until(lambda: page.execute_script(script, label))


def fill(page, label, text):
    from selenium.webdriver.common.keys import Keys

    def typed():
        part = field(page, label)
        part.send_keys(Keys.CONTROL, "a")
        part.send_keys(Keys.DELETE, str(text))
        return field(page, label).get_property("value") == str(text)  # a busy page may have taken other keys first

    until(typed)
    # the page takes over what was typed once it is drawn, and a click that follows at once would miss it
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def turn(page, technique, knob, text):
    """Opens the knobs of a technique that is chosen and types one's value."""
    from selenium.webdriver.common.keys import Keys

    script = """
        const knobs = [...document.querySelectorAll('.da-knobs details')].find(
            (one) => one.offsetParent && one.querySelector('summary').textContent === 'Knobs of ' + arguments[0]);
        if (!knobs) return;
        knobs.open = true;
        const label = [...knobs.querySelectorAll('label')].find((one) => one.firstChild.textContent === arguments[1]);
        return label.querySelector('input')"""
    part = until(lambda: page.execute_script(script, technique, knob))
    part.send_keys(Keys.CONTROL, "a")
    part.send_keys(Keys.DELETE, text)


def pick(page, slot, technique):
    """Chooses a technique for a slot."""
    script = """
        const label = [...document.querySelectorAll('.da-knobs label')].find(
            (one) => one.offsetParent && one.firstChild.textContent === arguments[0]);
        return label && label.querySelector('select')"""
    until(lambda: page.execute_script(script, slot)).send_keys(technique)


def press(page, name):
    script = """return [...document.querySelectorAll('button')].find(
        (one) => one.offsetParent && !one.disabled && one.textContent.trim().startsWith(arguments[0]))"""
    until(lambda: page.execute_script(script, name)).click()


def choose(page, name):
    script = """return [...document.querySelectorAll('label')].find(
        (one) => one.offsetParent && one.textContent.trim() === arguments[0])"""
    until(lambda: page.execute_script(script, name)).click()


def part(page, name):
    """The visible text of a part of the panel."""
    script = """
        const panel = [...document.querySelectorAll('.da')].find((one) => one.offsetParent);
        const found = panel.querySelector('[data-da="' + arguments[0] + '"]');
        return found.hidden ? '' : found.textContent"""
    return page.execute_script(script, name)


def end(page):
    """Waits for the end of what was started; how it ended."""
    return until(lambda: (found := part(page, "status")) not in ("", "Waiting", "Working") and found)


def generate(page):
    """Starts and waits for the end; how it ended."""
    page.execute_script("for (const one of document.querySelectorAll('[data-da=status]')) one.textContent = ''")
    press(page, "Generate")
    return end(page)


def go_to(page, name):
    """Another tab; what measures their widths has buttons too."""
    script = """return [...document.querySelectorAll('[role=tab]')].find(
        (one) => one.textContent.trim() === arguments[0] && getComputedStyle(one).visibility === 'visible')"""
    until(lambda: page.execute_script(script, name)).click()


def figures(page):
    script = """return [...document.querySelectorAll('[data-da=figures] tr')].map(
        (row) => [...row.children].map((cell) => cell.textContent))"""
    return page.execute_script(script)


def move(page, name, value):
    script = """
        const range = document.querySelector('[data-da="' + arguments[0] + '"]');
        range.value = arguments[1];
        range.dispatchEvent(new Event('input'))"""
    page.execute_script(script, name, value)


def link(site, **settings):
    return site[0] + "?settings=" + urllib.parse.quote(json.dumps({"version": 1, **settings}))


# -- making ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def coloured(monkeypatch):
    """Frames of the dense video become shades of red, those of any other shades of green, 20 more in each frame."""
    from diffaccel.pipelines import CausalWanPipeline

    original = CausalWanPipeline.stream

    def stream(self, **arguments):
        at, channel = 0, 0 if not active_run(self).accel.policies() else 1
        for chunk in original(self, **arguments):
            chunk[:] = 0
            for frame in chunk[0]:
                frame[..., channel] = (60 + 20 * at) / 255
                at += 1
            yield chunk

    monkeypatch.setattr(CausalWanPipeline, "stream", stream)


def shades(page):
    """Number of the frame, and the frames that the left and the right quarter of the canvas show."""
    script = """
        const canvas = document.querySelector('[data-da=canvas]'), context = canvas.getContext('2d');
        const at = (x) => [...context.getImageData(x * canvas.width, canvas.height / 2, 1, 1).data];
        return [Number(canvas.dataset.frame), at(0.25), at(0.75)]"""
    number, left, right = page.execute_script(script)
    assert left[1] < 30, "dense is red"
    assert right[0] < 30, "accelerated is green"
    return number, round((left[0] - 60) / 20), round((right[1] - 60) / 20)


def test_a_video_is_made_densely_and_accelerated_and_both_play_in_step(page, coloured):
    requested(page)
    assert generate(page) == "Done", part(page, "error")
    names, *rows = figures(page)
    assert names == ["measured", "dense", "accelerated"]
    assert {"frames/s", "seconds", "cache, tokens a layer", "cache, memory"} <= {row[0] for row in rows}
    assert "as fast as dense" in part(page, "verdict")
    until(lambda: part(page, "frame").endswith("/9"))
    played = set()
    while len(played) < 6:  # while it plays
        number, left, right = shades(page)
        assert left == right == number
        played.add(number)
    move(page, "seek", 5)
    assert part(page, "play") == "Play"  # seeking stops
    assert shades(page) == (5, 5, 5)
    press(page, "Side by side")
    assert shades(page) == (5, 5, 5)
    press(page, "Wipe")
    for share, left, right in ((100, True, True), (0, False, False)):  # whether it is the dense one that is seen
        move(page, "wipe", share)
        script = """
            const canvas = document.querySelector('[data-da=canvas]'), context = canvas.getContext('2d');
            return [0.25, 0.75].map((x) => context.getImageData(x * canvas.width, 9, 1, 1).data[0] > 100)"""
        assert page.execute_script(script) == [left, right]
    assert all(address.startswith(("http://127.0.0.1:", "data:", "blob:")) for address in requested(page))
    press(page, "Play")
    assert part(page, "play") == "Pause"


def test_frames_and_figures_show_while_it_is_made_and_cancelling_keeps_them(page, site):
    fill(page, "frames", 4001)
    fill(page, "steps", 2)
    choose(page, "dense")
    press(page, "Generate")
    until(lambda: "step" in part(page, "headline"))
    before = until(lambda: (found := part(page, "frame")) and int(found.split("/")[1]))
    until(lambda: int(part(page, "frame").split("/")[1]) > before)
    rows = dict(row for row in figures(page)[1:])
    assert float(rows["frames/s"]) > 0
    assert int(rows["cache, tokens a layer"].replace(",", "")) > 0
    press(page, "Cancel")
    assert end(page) == "Cancelled"
    assert "kept" in part(page, "headline")
    until(lambda: "Dense (MP4)" in part(page, "files"))
    choose(page, "accelerated")
    fill(page, "frames", 5)
    assert generate(page) == "Done"  # the pipeline is free


def test_two_readers_wait_in_line(page, site):
    fill(page, "frames", 4001)
    choose(page, "dense")
    press(page, "Generate")
    until(lambda: part(page, "status") == "Working")
    with chromium() as other:
        load(other, site[0])
        fill(other, "prompt", "a blue square")
        press(other, "Generate")
        until(lambda: part(other, "headline") == "Waiting for causal: 1 ahead of you")
        page.get("about:blank")  # the first leaves, and what it waited for ends
        console_errors(page)  # of a connection that was cut
        assert end(other) == "Done"
        assert not console_errors(other)


def test_a_technique_that_never_engaged_is_told(page, site):
    load(page, link(site, prompt="a red circle", model="causal", arms="accelerated", set=["cache.threshold=1"]))
    assert generate(page) == "Done"
    assert "never engaged: TempCache" in part(page, "warnings")


def test_a_larger_video_and_a_text(page):
    go_to(page, "Larger than trained")
    fill(page, "prompt", "a red circle")
    fill(page, "frames", 5)
    fill(page, "strength", 1)
    assert generate(page) == "Done", part(page, "error")
    go_to(page, "Text")
    choose(page, "compare")
    assert generate(page) == "Done", part(page, "error")
    assert "#41 1 #42 6 #43 8" in part(page, "texts")


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_a_mistake_is_one_sentence(page):
    mistakes = [
        ("prompt", "", "the prompt is empty", "a red circle"),
        ("prompt", "a" * 401, "has 401 characters", "a red circle"),
        ("frames", "10", "the nearest valid values are 9 and 13", "9"),
        ("frames", "", "frames is a whole number, got nothing", "9"),
        ("seed", "-1", "a seed is a whole number in [0, 4294967295], got -1", "0"),
        ("seed", "1.5", "seed is a whole number, got 1.5", "0"),
        ("steps", "1000", "steps lies in [1, 50]", "3"),
    ]
    for label, wrong, sentence, right in mistakes:
        fill(page, label, wrong)
        assert generate(page) == "Not made"
        assert sentence in part(page, "error")
        fill(page, label, right)
    assert generate(page) == "Done"
    assert part(page, "error") == ""


def test_a_knob_with_a_wrong_value_is_told_as_on_the_command_line(page):
    press(page, "Techniques and their knobs")
    for wrong in ("much", HOSTILE):
        turn(page, "TempCache", "threshold", wrong)
        assert generate(page) == "Not made"
        assert "cache.threshold takes a number" in part(page, "error")
        assert f"got '{wrong}'" in part(page, "error")
    assert page.execute_script("return window.hit") is None


def test_another_technique_brings_its_knobs_and_what_was_typed_comes_back(page):
    press(page, "Techniques and their knobs")
    turn(page, "TempCache", "threshold", "0.7")
    pick(page, "cache", "SinkRecent")
    turn(page, "SinkRecent", "recent_frames", "3")
    assert generate(page) == "Done"
    asked = json.loads(urllib.parse.parse_qs(urllib.parse.urlparse(page.current_url).query)["settings"][0])
    assert asked["set"] == ["cache=SinkRecent", "cache.recent_frames=3"]
    pick(page, "cache", "TempCache")
    assert generate(page) == "Done"
    asked = json.loads(urllib.parse.parse_qs(urllib.parse.urlparse(page.current_url).query)["settings"][0])
    assert asked["set"] == ["cache.threshold=0.7"]


def test_nothing_that_is_written_becomes_markup(page, site, monkeypatch):
    monkeypatch.setattr("diffaccel.demo.making.unread", lambda *_: [f"does not know {HOSTILE}"])
    for address in (site[0], link(site, prompt=HOSTILE, model=HOSTILE), link(site, **{HOSTILE: 1})):
        load(page, address)
        fill(page, "prompt", HOSTILE)
        choose(page, "dense")
        assert generate(page) == "Done", part(page, "error")
        assert HOSTILE in part(page, "notes")
        press(page, "Share settings")
        press(page, "Show those of video")
        until(lambda: "onerror" in field(page, "settings").get_attribute("value"))
        assert page.execute_script("return window.hit") is None
        assert not page.execute_script(
            "return [...document.images].filter((one) => one.getAttribute('src') === 'x').length"
        )
        press(page, "Share settings")


# -- sharing -----------------------------------------------------------------------------------------------------------


def test_the_address_holds_what_was_made_and_brings_it_back(page, site):
    fill(page, "seed", 7)
    press(page, "Techniques and their knobs")
    turn(page, "FlashBlock", "refresh", "0,2")
    assert generate(page) == "Done"
    shared = page.current_url
    asked = json.loads(urllib.parse.parse_qs(urllib.parse.urlparse(shared).query)["settings"][0])
    assert (asked["seed"], asked["set"]) == (7, ["reuse.refresh=0,2"])
    load(page, shared)
    until(lambda: field(page, "seed").get_attribute("value") == "7")
    assert generate(page) == "Done"  # the knobs lie in a part that was never opened
    assert page.current_url == shared


def test_settings_that_cannot_be_loaded_are_told(page):
    said = "return document.querySelector('.da-say p').textContent"
    press(page, "Share settings")
    for text, sentence in (
        ('{"version": 2, "tab": "video"}', "are of version 2, and this page reads version 1"),
        ('{"version": 1, "sed": 3}', "did you mean 'seed'"),
        ('{"version": 1, "model": "/etc"}', "unknown model of the tab video"),
        ('{"version": 1, "set": ["reuse.profile=/etc/passwd"]}', "names a file of the server"),
        ('{"version": 1, "tab": "text", "set": ["kernel=sdpa"]}', "not kernel"),
        ("{", "no JSON"),
    ):
        fill(page, "settings", text)
        press(page, "Load these")
        until(lambda wanted=sentence: wanted in page.execute_script(said))


def test_settings_can_be_loaded_from_text(page):
    press(page, "Share settings")
    fill(page, "settings", '{"version": 1, "tab": "text", "prompt": "recall", "tokens": 9}')
    press(page, "Load these")
    until(lambda: field(page, "tokens").get_attribute("value") == "9")
    assert field(page, "prompt").get_attribute("value") == "recall"


# -- by other hands ----------------------------------------------------------------------------------------------------


def test_everything_can_be_done_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    def key(*keys):
        page.switch_to.active_element.send_keys(*keys)

    def walk(name):
        """Tab until the focus is on a part of that name."""
        script = """const one = document.activeElement;
            return [one.textContent, one.getAttribute('aria-label'), one.dataset.da].join(' ')"""
        for _ in range(80):
            if name in page.execute_script(script):
                return
            key(Keys.TAB)
        raise AssertionError(f"{name} is not reached")

    field(page, "prompt").click()
    key(Keys.ENTER)  # starts
    assert end(page) == "Done"
    walk("Generate")
    key(Keys.ENTER)
    until(lambda: part(page, "status") in ("Waiting", "Working"))
    walk("Cancel")
    key(Keys.ENTER)
    assert end(page) in ("Cancelled", "Done")
    choose(page, "dense")
    field(page, "prompt").click()
    key(Keys.ENTER)
    assert end(page) == "Done"
    walk("Play or pause")
    playing = part(page, "play")
    key(Keys.SPACE)
    assert part(page, "play") != playing
    walk("Frame")
    key(Keys.HOME)
    until(lambda: part(page, "frame") == "1/9")
    key(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    until(lambda: part(page, "frame") == "3/9")


def cut_off(page):
    """What of the panel lies beyond the right edge, tables aside, which scroll."""
    script = """
        return [...document.querySelectorAll('.da *')].filter((one) => one.offsetParent && !one.closest('.da-scroll') &&
            one.getBoundingClientRect().right > document.documentElement.clientWidth).map((one) => one.outerHTML)"""
    return page.execute_script(script)


def test_a_phone_shows_it_without_scrolling_sideways(site):
    with chromium(width=390, height=844) as phone:
        load(phone, site[0])
        fill(phone, "prompt", "a red circle")
        assert generate(phone) == "Done"
        assert overflow(phone) <= 0
        assert not cut_off(phone)
        press(phone, "Side by side")
        assert not cut_off(phone)
        press(phone, "Techniques and their knobs")
        turn(phone, "TempCache", "threshold", "0.5")
        assert overflow(phone) <= 0
        for tab in ("Larger than trained", "Text"):
            go_to(phone, tab)
            assert overflow(phone) <= 0
        assert not console_errors(phone)
