"""A report says what the rows say, in one file that opens offline, whatever was written into the prompts."""

import json
import re
import shutil
from html.parser import HTMLParser
from statistics import mean
from urllib.parse import unquote

import pytest
import torch
from browser import chromium, console_errors, overflow, requested
from tiny import tiny_pipeline
from typer.testing import CliRunner

from diffaccel import Accel, FlashBlock, SinkRecent
from diffaccel.cli import app
from diffaccel.eval import Arm, EvalError, Measures, Setup, Store
from diffaccel.eval.frontier import run_frontier
from diffaccel.eval.page.charts import HEIGHT, Series, Strip, chart, heat
from diffaccel.eval.page.markdown import escaped
from diffaccel.eval.report import Folder, write_report

HOSTILE = [
    """a red circle </script><script>window.hacked = 1</script>""",
    """"><img src=x onerror="hacked=1">|`{{ 7*7 }}""",
]
FRAMES = 25


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with quality, one length of throughput, and a frontier of two settings."""
    torch.manual_seed(0)
    pipe, folder = tiny_pipeline(), tmp_path_factory.mktemp("made") / "results"
    arms = {
        "recent=3": Arm(Accel(cache=SinkRecent(3, 0)), "fast", {"cache.recent_frames": "3"}),
        "<b>reuse": Arm(Accel(cache=SinkRecent(6, 0), reuse=FlashBlock(refresh=2, min_past=0)), None, {}),
    }
    arguments = {"height": 32, "width": 48, "num_frames": FRAMES, "num_inference_steps": 2, "guidance_scale": 1.0}
    run_frontier(
        Setup(pipe, arms, folder, HOSTILE, [0], arguments, "<i>tiny", "diffaccel eval '<x>'"), Measures(), rounds=2
    )
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "results")


@pytest.fixture(scope="module")
def written(made):
    """A report with throughput at three lengths: 2, 1 and 0.5 times the seconds of dense attention."""
    folder = shutil.copytree(made, made.parent / "more")
    (folder / "throughput.jsonl").unlink()
    store = Store(folder)
    for frames, times in ((17, 2.0), (FRAMES, 1.0), (49, 0.5)):
        for arm, factor in (("dense", 1.0), ("recent=3", times)):
            for number, noise in enumerate((0.99, 1.0, 1.01)):
                seconds = dict.fromkeys(("attention", "denoise", "decode", "total"), frames / 10 * factor * noise)
                row = {"arm": arm, "frames": frames, "round": number, "seconds": seconds, "tokens": 6 * frames}
                row |= {"key": f"{frames} {arm} {number}", "fps": {}, "peak_bytes": None, "cache_bytes": 2**20}
                store.append("throughput", row)
    write_report([folder])
    return folder


def rows(folder, arm, way="free_running"):
    return [row for row in Store(folder).rows("quality") if (row["arm"], row["way"]) == (arm, way)]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._inside = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text += data


# -- what it says --------------------------------------------------------------------------------------------------


def test_the_headline_is_what_the_rows_say(written):
    part = Folder(written)
    text = (written / "report.md").read_text()
    table = text[text.index("### Headline") : text.index("### All measures")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    lines = {first: rest for first, *rest in cells}
    heading = lines[""]
    assert list(lines)[2:] == ["dense", "recent=3", r"\<b\>reuse", "noise floor", "another seed"]
    for name, arm in (("recent=3", "recent=3"), (r"\<b\>reuse", "<b>reuse")):
        for column, way in (("PSNR, shared history", "shared_history"), ("PSNR, free-running", "free_running")):
            scores = [row["scores"] for row in rows(written, arm, way)]
            psnr, worst = mean(s["psnr_pooled"] for s in scores), min(s["psnr_worst"] for s in scores)
            assert lines[name][heading.index(column)] == f"{psnr:.1f} (worst {worst:.1f})"
    floor = mean(row["scores"]["psnr_pooled"] for row in rows(written, "dense", "noise_floor"))
    assert lines["noise floor"][heading.index("PSNR, free-running")].startswith(f"{floor:.1f} ")
    assert lines["recent=3"][heading.index("end to end")] == "1.00x ? (2.50 s)"  # the rounds overlap
    assert lines["dense"][heading.index("end to end")] == "2.50 s"
    assert lines["dense"][heading.index("memory")] == "1.0 MiB (in caches)"
    assert "| 17 | recent=3 | 3.40 (3.37 to 3.43, 0.50x slower) |" in text
    assert "recent=3, end to end: breaks even with dense at about 25 frames\n" in text
    assert part.content()["speed"]["break_even"]["recent=3"]["total"] == pytest.approx(FRAMES)
    html = (written / "report.html").read_text()
    assert all(row[1] in Page(html).text for row in (("dense", "reference"), ("recent=3", "1.00x ?")))


def test_speeds_without_throughput_are_those_of_the_runs_that_all_arms_share(folder):
    for name in ("throughput.jsonl", "frontier.jsonl"):
        (folder / name).unlink()
    lines = (folder / "quality.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    for row in kept:
        row["seconds"] = dict.fromkeys(row["seconds"], 2.0 if row["prompt"] == 0 else 9.0)
        row["dense_seconds"] = dict.fromkeys(row["seconds"], 3.0 if row["prompt"] == 0 else 1.0)
    kept = [row for row in kept if not (row["prompt"] == 1 and row["arm"] == "<b>reuse")]  # stopped in between
    (folder / "quality.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    write_report([folder])
    text = (folder / "report.md").read_text()
    assert "| recent=3 |" in text
    assert text.count("1.50x (2.00 s)") == 2 * 3  # not the second prompt, which one arm lacks
    assert "each run once beside its quality" in text
    assert "throughput against the length of the video was not measured" in text
    assert "no knob was swept" in text


def test_missing_parts_are_said_and_not_blank(folder):
    for name in ("throughput.jsonl", "frontier.jsonl", "quality.jsonl"):
        (folder / name).unlink()
    write_report([folder])
    text = Page((folder / "report.html").read_text()).text
    for said in ("No quality was measured in this folder", "No video is here", "so there are no curves",
                 "diffaccel eval throughput times every arm", "No knob was swept", "No block was finished and kept",
                 "have no counts by layer"):  # fmt: skip
        assert said in text
    assert (
        "no quality was measured here"
        in json.loads((folder / "report.json").read_text())["folders"][0]["not_measured"][0]
    )


def test_what_is_incomplete_or_torn_or_gone_is_said(folder):
    lines = (folder / "quality.jsonl").read_text().splitlines()
    (folder / "quality.jsonl").write_text("\n".join(lines)[:-30])  # of ten rows
    (folder / "videos" / "p000-s0" / "noise_floor.mp4").unlink()
    said = []
    write_report([folder], note=said.append)
    assert any("torn by a kill" in sentence for sentence in said)
    assert any(sentence.startswith("1 videos that the rows name are not there") for sentence in said)
    assert "- 1 rows of quality are not there yet: the same command goes on" in (folder / "report.md").read_text()


def test_two_folders_are_two_parts(folder, made, tmp_path):
    with pytest.raises(EvalError, match="a report on 2 folders belongs to none of them; name its own with -o"):
        write_report([folder, made])
    (tmp_path / "both").mkdir()
    html, _, data = write_report([folder, made], tmp_path / "both")
    assert [part["folder"] for part in json.loads(data.read_text())["folders"]] == ["results", "results"]
    ids = [given["id"] for _, given in Page(html.read_text()).tags if "id" in given]
    assert len(ids) == len(set(ids))
    assert {"f0", "f1"} < set(ids)


# -- what it must not do -------------------------------------------------------------------------------------------


def test_what_people_wrote_is_text(written):
    html = (written / "report.html").read_text()
    page = Page(html)
    policy = next(given["content"] for tag, given in page.tags if given.get("http-equiv"))
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "media-src blob:;" in policy
    assert not {"img", "iframe", "link", "object", "b", "i"} & {tag for tag, _ in page.tags}
    assert not [given for _, given in page.tags for name in given if name.startswith("on") or name == "style"]
    scripts = [given for tag, given in page.tags if tag == "script"]
    assert len([given for given in scripts if "type" not in given]) == 1
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", html)
    for prompt in HOSTILE:
        assert prompt in page.text
    text = (written / "report.md").read_text()
    assert not re.search(r"(?<!\\)<", text.replace("diffaccel eval '<x>'", ""))  # a command is a code block


def test_text_in_markdown_is_as_written():
    assert escaped("a|b <i> `c`\n*d* [e](f) # !") == r"a\|b \<i\> \`c\` \*d\* \[e\](f) \# \!"


def test_a_video_outside_of_its_folder_is_not_shown(folder, tmp_path):
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    lines = (folder / "quality.jsonl").read_text()
    (folder / "quality.jsonl").write_text(lines.replace("videos/p000-s0/noise_floor.mp4", "../secret.mp4"))
    with pytest.raises(EvalError, match=r"name a video outside of it, '../secret.mp4'"):
        write_report([folder])
    assert not (folder / "report.html").exists()


def test_the_page_is_bounded(folder, tmp_path):
    whole, some = (tmp_path / name for name in ("whole", "some"))
    said = []
    for out, limit in ((whole, 64), (some, 0.3)):
        out.mkdir()
        write_report([folder], out, max_mb=limit, note=said.append)
    large, small = ((out / "report.html").read_text() for out in (whole, some))
    count = len(list(folder.rglob("videos/*/*.mp4")))
    assert large.count('type="text/plain"') == count
    inside = re.findall(r'id="clip-\d+">([^<]*)<', small)
    assert 0 < sum(map(len, inside)) <= 300_000
    beside = re.findall(r'"href": "([^"]+)"', small)
    assert len(beside) == count - len(inside)
    assert all((some / unquote(name)).resolve().is_file() for name in beside)
    assert said == [f"{len(beside)} videos are beside the page, not in it, because it holds at most 0.3 MB of them"]


# -- pictures ------------------------------------------------------------------------------------------------------


def test_a_line_goes_through_its_points():
    made = str(chart("t", "x", "y", [Series("a", [0, 1, 2, 4], [0.0, None, 10, 5], 1)]))
    data = json.loads(dict(Page(made).tags[0][1])["data-chart"])
    (a, b, c) = data["series"][0]["points"]
    assert [point[2:] for point in (a, b, c)] == [["0", "0"], ["2", "10"], ["4", "5"]]
    assert (b[0] - a[0]) / (c[0] - a[0]) == pytest.approx(0.5, abs=1e-2)
    assert (a[1] - c[1]) / (a[1] - b[1]) == pytest.approx(0.5, abs=1e-2)
    assert data["top"] == b[1] < a[1] == data["bottom"] < HEIGHT
    assert re.findall(r'polyline class="line s-1 d-0" points="([^"]*)"', made) == [f"{b[0]},{b[1]} {c[0]},{c[1]}"]
    assert chart("t", "x", "y", [Series("a", [1], [None])]) is None
    assert chart("t", "x", "y", [Series("a", [1], [3.0])]) is not None  # one value has a scale as well


def test_a_chart_marks_levels_spreads_and_what_is_said_beside_points():
    series = Series("a", [1, 2], [1.0, 3.0], "dense", joined=False, spread=[(0.5, 5.0), None], notes=["n0", "n1"])
    made = str(chart("t", "x", "y", [series], level=(2, "even"), uprights=[(1.5, "here")]))
    assert "polyline" not in made
    assert made.count('class="spread') == 1
    assert made.count("<path") >= 2  # a diamond each
    assert ">even</text>" in made
    assert ">here</text>" in made
    assert "n1" in made


def test_a_heat_map_has_a_cell_a_layer():
    made = Page(
        str(heat("t", ["0", "1"], [Strip("read", [0.0, 1.0], ["none", "all"]), Strip("no", [None], ["?"])], "layer"))
    )
    cells = [given for tag, given in made.tags if tag == "rect"]
    assert [cell["class"] for cell in cells] == ["h-0", "h-10", "h-none"]
    assert [cell["data-said"] for cell in cells] == ["layer 0, read: none", "layer 1, read: all", "layer 0, no: ?"]


def test_layers_and_blocks_are_those_of_the_rows(written):
    page = Page((written / "report.html").read_text())
    said = [given["data-said"] for tag, given in page.tags if tag == "rect"]
    mine = [row["layers"] for row in rows(written, "<b>reuse")]
    total, read, reused, calls = (
        sum(pick(layer) for layers in mine for layer in layers if (layer["layer"], layer["part"]) == (1, "self"))
        for pick in (
            lambda x: x["keys_total"],
            lambda x: x["keys_read"],
            lambda x: x["engaged"]["reuse"],
            lambda x: x["calls"],
        )
    )
    assert 0 < read < total
    assert f"layer 1, keys read: {read / total:.1%} of the keys" in said
    assert f"layer 1, reuse engaged: at {reused / calls:.0%} of the calls" in said
    charts = {
        label["aria-label"].split(":")[0]: json.loads(given["data-chart"])
        for (_, given), (_, label) in zip(page.tags, page.tags[2:], strict=False)
        if "data-chart" in given
    }
    density = {s["name"]: [float(p[3]) for p in s["points"]] for s in charts["Density"]["series"]}
    blocks = rows(written, "recent=3")[0]["blocks"]
    assert density["recent=3"] == [float(f"{b['tokens'] / b['seen']:.4g}") for b in blocks]
    assert density["dense"] == [1] * len(blocks)
    frontier = {s["name"]: s["points"] for s in charts["Quality against time"]["series"]}
    assert sum(map(len, frontier.values())) == 2
    assert "dense, noise floor" in page.text


# -- on the command line -------------------------------------------------------------------------------------------


def test_the_command_writes_three_files(folder):
    found = CliRunner().invoke(app, ["report", str(folder)], catch_exceptions=False)
    assert found.exit_code == 0
    assert [name in found.stdout for name in ("report.html", "report.md", "report.json")] == [True] * 3
    assert all((folder / f"report.{kind}").stat().st_size > 1000 for kind in ("html", "md", "json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{empty}"], "holds no results of diffaccel eval: there is no asked.json in it"),
        (["{results}", "-o", "no/where"], "the folder 'no/where' does not exist"),
        (["{results}", "{empty}"], "a report on 2 folders"),
        (["{results}", "--max-mb", "-1"], "0 or more megabytes of video, got -1"),
    ],
)
def test_a_mistake_is_one_sentence(folder, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "results": folder}
    found = CliRunner().invoke(app, ["report", *(a.format(**places) for a in arguments)], catch_exceptions=False)
    assert found.exit_code == 2
    assert message in found.stderr


# -- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_page(written):
    with chromium() as page:
        page.get((written / "report.html").as_uri())
        wait(page, "return [...document.querySelectorAll('video')].every(v => v.readyState > 1 && !v.seeking)")
        yield page


def wait(page, condition, seconds=10):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(page, seconds, 0.05).until(lambda p: p.execute_script(condition))


def places(page):
    return page.execute_script("return [...document.querySelectorAll('video')].map(v => v.currentTime)")


def press(page, key, where=".player"):
    page.find_element("css selector", where).send_keys(key)


def test_it_opens_without_errors_or_network(open_page):
    asked = requested(open_page)
    assert asked
    assert all(url.startswith(("file:", "blob:")) for url in asked)
    assert not console_errors(open_page)
    assert open_page.execute_script("return window.hacked === undefined && document.images.length === 0")
    blocked = open_page.execute_async_script("""
        const done = arguments[0];
        document.addEventListener("securitypolicyviolation", (event) => done(event.violatedDirective), { once: true });
        document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/x.png" }));
    """)
    assert blocked == "img-src"
    console_errors(open_page)  # the one that was just made


def test_two_videos_play_in_step(open_page):
    press(open_page, " ")
    wait(open_page, "return document.querySelector('video').currentTime > 0.7")
    left, right = places(open_page)
    assert abs(left - right) < 2.5 / 16
    press(open_page, " ")
    wait(open_page, "return [...document.querySelectorAll('video')].every(v => v.paused && !v.seeking)")
    left, right = places(open_page)
    assert left == right > 0.6
    frame = open_page.find_element("css selector", ".frame").get_attribute("value")
    assert open_page.find_element("css selector", ".count").text == f"{int(frame) + 1} of {FRAMES}"
    press(open_page, " ")
    wait(open_page, "return document.querySelector('.play').ariaPressed === 'false'")  # at the end by itself
    assert open_page.find_element("css selector", ".count").text == f"{FRAMES} of {FRAMES}"
    assert not console_errors(open_page)


def test_keys_step_and_wipe(open_page, written):
    from selenium.webdriver.common.keys import Keys

    press(open_page, Keys.HOME)
    assert open_page.find_element("css selector", ".count").text == f"1 of {FRAMES}"
    press(open_page, Keys.END)
    for _ in range(3):
        press(open_page, Keys.ARROW_LEFT)
    press(open_page, Keys.ARROW_RIGHT)
    wait(open_page, "return [...document.querySelectorAll('video')].every(v => !v.seeking)")
    assert places(open_page) == pytest.approx([(FRAMES - 2.5) / 16] * 2, abs=1e-3)
    assert open_page.find_element("css selector", ".count").text == f"{FRAMES - 2} of {FRAMES}"
    said = open_page.find_element("css selector", ".of-unit output").get_attribute("textContent")
    psnr = rows(written, "recent=3")[0]["frames"]["psnr"][FRAMES - 3]
    assert said.startswith(f"frame {FRAMES - 3} recent=3, free-running: {psnr:.4g}; ")  # curves follow the video
    press(open_page, "w")
    assert open_page.execute_script("return document.querySelector('.b').style.clipPath") == "inset(0px 0px 0px 50%)"
    boxes = [v.rect for v in open_page.find_elements("css selector", ".player video")]
    assert boxes[0] == boxes[1]
    press(open_page, Keys.HOME, ".edge")
    assert open_page.execute_script("return document.querySelector('.b').style.clipPath") == "inset(0px 0px 0px 0%)"
    press(open_page, "w")
    assert open_page.execute_script("return document.querySelector('.b').style.clipPath") == ""


def test_another_video_has_its_own_curves(open_page):
    from selenium.webdriver.support.ui import Select

    before = open_page.execute_script("return document.querySelector('.a').src")
    Select(open_page.find_element("css selector", ".unit")).select_by_index(1)
    Select(open_page.find_element("css selector", ".right")).select_by_visible_text("another seed")
    wait(open_page, "return [...document.querySelectorAll('video')].every(v => v.readyState > 1 && !v.seeking)")
    assert open_page.execute_script("return document.querySelector('.a').src") != before
    shown = open_page.find_elements("css selector", ".of-unit:not([hidden])")
    assert [part.get_attribute("data-unit") for part in shown] == ["1"]
    assert HOSTILE[1] in shown[0].text
    assert [name.text for name in open_page.find_elements("css selector", ".pane .name")] == ["dense", "another seed"]
    assert not console_errors(open_page)


def test_charts_are_read_by_keys_and_pointer(open_page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    figure = next(f for f in open_page.find_elements("css selector", ".chart") if "End to end: throughput" in f.text)
    svg, output = (figure.find_element("css selector", name) for name in ("svg[tabindex]", "output"))
    svg.send_keys(Keys.END)
    values = [line.text for line in figure.find_elements("css selector", ".legend li")]
    assert values == ["dense\n10", "recent=3\n20"]
    svg.send_keys(Keys.ARROW_LEFT)
    assert output.get_attribute("textContent") == f"frames generated {FRAMES} dense: 10; recent=3: 10"
    cell = open_page.find_elements("css selector", ".heat rect[data-said]")[1]
    ActionChains(open_page).scroll_to_element(cell).move_to_element(cell).perform()
    said = cell.find_element("xpath", "ancestor::figure").find_element("css selector", "output").text
    assert said == cell.get_attribute("data-said")


@pytest.mark.parametrize("limit", [64, 0])
def test_on_a_phone_and_in_the_dark(written, tmp_path, limit):
    write_report([written], tmp_path, max_mb=limit)
    with chromium(width=390, dark=True) as page:
        page.get((tmp_path / "report.html").as_uri())
        wait(page, "return [...document.querySelectorAll('video')].every(v => v.readyState > 1)")
        assert overflow(page) <= 0
        page.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        press(page, "w")
        assert overflow(page) <= 0
        assert page.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(15, 20, 25)"
        assert not console_errors(page)
