"""The page: one file that fetches nothing and runs nothing but its own script, and says what is not there."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from test_page_samples import NASTY, made

from crystal.evaluation import page
from crystal.evaluation.inside import Inside
from crystal.evaluation.latent_space import States

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ABOUT = {"name": "runs/x", "method": "crystal", "checkpoint": "step-7", "data": "some.jsonl"}
METRICS = (
    {"loss": [(1, 2.0), (2, 1.0)], "mass_int": [(1, 0.1), (2, 0.2)], "mass_cor": [(1, 0.1), (2, 0.3)]},
    {
        "gain": [(1, 0.1), (2, 0.25)],
        "gain_pm": [(1, 0.05), (2, 0.125)],
        "swap": [(2, 0.5)],
        "swap_pm": [(2, 1.0)],
    },
)
SUMMARY = {
    "conditions": [
        {"condition": "as trained", "right": 0.75, "low": 0.7, "high": 0.8},
        {
            "condition": "latents: swapped", "right": 0.5, "low": 0.45, "high": 0.55, "difference": -0.25,
            "difference_low": -0.4, "difference_high": 0.1, "changed": 0.125,
        },
    ],
    "rule": "used if so",
    "verdict": "The latents are used.",
}  # fmt: skip


def judged(right, **more):
    return {"entropy": 1.0, "salient": 1, "tokens": 4, "right": right} | more


def inside(two=True, latents=True, **changes):
    """What measure would find of three questions, one of them drawn, two with boxes."""
    count = 2 if latents else 0
    numbers = [judged(True, focus=0.5, chance=0.25), judged(False, focus=0.25, chance=0.25), judged(True)]
    looks = {"text": [numbers] * (2 if two else 1), "answer": [numbers]}
    points = {"image": torch.rand(4, 2), "text": torch.rand(3, 2)}
    if latents:
        looks["latents"], points["latents"] = [numbers], torch.rand(2, 2)
    between = 0.5 if latents else None
    found = {
        "samples": [made(2 if two else 1, count)], "looks": looks,
        "states": [States(0, points, (0.5, 0.25), between)], "reliance": None, "why": "there is <no> reason",
        "right": [True, False, True], "two_paths": two, "count": count,
        "layers": 5, "heads": 6, "shown": 3, "corruption": "blur, r = 5 px",
    }  # fmt: skip
    return Inside(**(found | changes))


def built(found=None, about=ABOUT, metrics=METRICS, reliance=(SUMMARY, "Asked here.")):
    return page.build(about, found or inside(), metrics, reliance)


class Read(HTMLParser):
    """A page's tags with their attributes, and each tag's text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + text


def prose(text):
    """What a reader reads."""
    text = re.sub("<(style|script).*?</\\1>", "", text, flags=re.DOTALL)
    return " ".join(re.sub("<[^>]*>", "", text).split())


def test_it_is_one_file_that_fetches_nothing():
    """Whatever a tag names lies in the page; the policy lets its own script run and no other."""
    text = built()
    read = Read(text)
    assert not read.open
    for tag, attributes in read.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img", "form")
        assert not any(name.startswith("on") for name in attributes), attributes
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text

    (policy,) = [a["content"] for tag, a in read.tags if a.get("http-equiv") == "Content-Security-Policy"]
    scripts = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 1 and scripts[0] == (page.ASSETS / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")


def test_what_comes_from_elsewhere_stays_text():
    """A question, an answer, names and a verdict that try to be tags; the JSON holds no tag at all."""
    found = inside(why=NASTY, corruption=NASTY)
    found.samples[0] = made(question=NASTY, answer=NASTY)
    found.samples[0].record.family, found.samples[0].other = NASTY, NASTY
    found.samples[0].tokens[0] = NASTY
    about = dict.fromkeys(ABOUT, NASTY)
    summary = json.loads(json.dumps(SUMMARY).replace("swapped", "<b onclick=x>").replace("used", "<img>"))
    for reliance in ((summary, NASTY), (None, NASTY)):
        text = built(found, about, ({NASTY: [(1, 1.0), (2, 2.0)]}, {}), reliance)
        read = Read(text)
        assert not read.open and "img" not in [tag for tag, _ in read.tags]
        assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)
        assert [tag for tag, _ in read.tags].count("script") == 2
        (numbers,) = re.findall(
            '<script type="application/json" id="numbers">(.*?)</script>', text, re.DOTALL
        )
        assert "<" not in numbers and json.loads(numbers)[0]["sizes"] == [2, 2, 3]


def test_the_heading_says_how_it_stands():
    text = prose(built())
    assert (
        "a run of the method crystal, its checkpoint step-7. Of 3 questions of some.jsonl it answers 67 %"
        in text
    )
    assert "The latents are used. At the last validation gain was +0.250 ±0.125 nats." in text
    assert "At the last validation swap was +0.500 ±1.000 nats." in text


def test_each_section_says_what_would_be_seen_without_use():
    sections = built().split("<section ")[1:]
    assert [re.match('id="(.*?)"', section)[1] for section in sections] == list(page.SECTIONS)
    for section in sections[:5]:
        assert "If the latents carried nothing" in prose(
            section
        ) or "if the latents carried nothing" in prose(section)


@pytest.mark.parametrize("two, latents", [(False, False), (False, True), (True, True)])
def test_what_a_method_does_not_have_is_told(two, latents):
    training = METRICS[0] if two else {"ce": [(1, 1.0), (2, 0.5)]}
    validation = METRICS[1] if latents else {}
    text = prose(built(inside(two, latents), metrics=(training, validation), reliance=(None, "")))
    assert ("The method has one path" in text) == (not two)
    assert ("There are no latents here, and so neither bars" in text) == (not latents)
    assert ("Gain and swap are of latents, which this method does not have." in text) == (not latents)
    assert ("If the latents carried nothing" in text) == latents
    assert "no table of interventions on latents: there is &lt;no&gt; reason." in text


def test_a_log_without_validations_and_records_without_boxes():
    found = inside()
    for paths in found.looks.values():
        for numbers in paths:
            for one in numbers:
                one.pop("focus", None)
    text = prose(built(found, metrics=(METRICS[0], {})))
    assert "The log holds no gain, swap or drop" in text and "No question has boxes" in text


def test_the_table_of_laviT():
    """By hand: salient 1, 2, 3 of 4 tokens each, entropy 1, 1, 0.7; standard deviations of n - 1."""
    numbers = [judged(True), judged(True, salient=2), judged(True, salient=3, entropy=0.7)]
    entropy = torch.tensor([1.0, 1.0, 0.7])
    std = float(entropy.std())
    even = float((entropy / torch.tensor(4.0).log()).mean())
    assert page.table2(numbers) == [
        "2.0", "50 %", "1.0", "1–3", "0.500",
        "0.900", f"{100 * even:.0f} %", f"{std:.3f}", f"{std / 0.9:.3f}",
    ]  # fmt: skip


def test_the_focus_score_is_told_for_right_and_wrong():
    text = prose(page.focused(inside()))
    assert "An even look would score 0.25 here" in text
    assert "of the text, 0.50 where the answer is right, 0.25 where wrong" in text


def test_the_table_of_interventions():
    """Differences in points with their intervals, and each on one line from the lowest end to the highest."""
    text = page.relied(inside(), SUMMARY, "Asked here.")
    rows = re.findall("<tr>(.*?)</tr>", text)
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall("<td>(.*?)</td>", rows[2])]
    assert cells == ["latents: swapped", "50.0 ±5.0", "-25.0", "-40.0 to +10.0", "", "12.5"]
    assert len(re.findall("<td>", rows[1])) == 6
    # -0.4 to 0.1 over 5 to 135: a tenth is 26.
    places = re.search('<line x1="(.*?)" x2="(.*?)" y1="7" y2="7"/><circle cx="(.*?)"', rows[2])
    assert [float(x) for x in places.groups()] == pytest.approx([5, 135, 5 + 1.5 * 26], abs=0.1)
    assert '<line class="zero" x1="109.0" x2="109.0"' in rows[2]
    assert "Asked here. Every line keeps" in prose(
        text
    ) and "The latents are used. The rule: used if so." in prose(text)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_a_pointer_is_answered(tmp_path):
    """In a browser: the view that the address names, a head that is pointed at, no script of a record's."""
    found = inside()
    found.samples = [made(), made(question=NASTY)]
    text = built(found)
    probe = """
    const section = document.querySelectorAll(".sample")[1];
    const read = (path, what) => section.querySelectorAll(".path")[path].querySelector(what);
    const opacity = (rect) => rect.getAttribute("fill-opacity");
    const veil = () => [...read(1, ".veil").children].map(opacity).join(" ");
    const select = section.querySelector("select");
    const said = [location.hash, select.value, section.querySelectorAll(".path")[1].className];
    select.value = "0";
    select.dispatchEvent(new Event("change"));
    const cell = read(0, '.heads.image [data-layer="1"][data-head="2"]');
    cell.dispatchEvent(new PointerEvent("pointerenter"));
    said.push(section.querySelector(".pointed").textContent, veil());
    said.push(read(0, "[data-fill=image]").textContent);
    cell.dispatchEvent(new PointerEvent("pointerleave"));
    section.querySelector("button").click();
    said.push(location.hash, veil(), read(0, "[data-fill=image]").textContent);
    read(1, ".veil").children[3].dispatchEvent(new PointerEvent("pointerenter"));
    said.push(section.querySelector(".pointed").textContent);
    document.title = JSON.stringify(said);
    """
    digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
    text = text.replace("script-src ", f"script-src 'sha256-{digest}' ")
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", f"<script>{probe}</script></body>"))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--enable-logging=stderr", "--dump-dom", f"file://{file}#sample=2&token=1&layer=1&head=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    said = json.loads(re.search("<title>(.*?)</title>", done.stdout)[1].replace("&amp;", "&"))

    one = found.samples[1]
    peak = float(one.image[1, 0, 1, 2].max())
    expected = [0.8 * (1 - x / peak) for x in one.image[1, 0, 1, 2].tolist()]
    assert said[0] == "#sample=2&token=1&layer=1&head=1" and said[1] == "1" and said[2] == "path copied"
    assert said[3] == "layer 3, head 5"
    assert [float(x) for x in said[4].split()] == pytest.approx(expected, abs=0.003)
    assert said[5] == f"{100 * float(one.share[0, 0, 1, 2, 0]):.1f} %"
    assert said[6] == "#sample=2&token=0&layer=0&head=0"
    assert [float(x) for x in said[7].split()] == pytest.approx([0.6, 0.4, 0.2, 0.0], abs=0.003)
    assert said[8] == "10.0 %" and said[9] == "row 2, column 2: 4.0 % intact, 2.0 % corrupted"
