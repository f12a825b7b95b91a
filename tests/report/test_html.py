import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from rotrl.report import figures, html

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Balanced tags, ids, references and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.tags, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for key, value in attributes if key == "id"]
        keys = ("src", "href", "xlink:href", "srcset", "action")
        self.references += [value for key, value in attributes if key in keys]
        assert not [key for key, _ in attributes if key.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def rendered(record, run_dir):
    figures.draw(record, run_dir)
    return Page(html.render(record, run_dir).read_text(encoding="utf-8"))


def test_one_page_without_network_or_scripts(full):
    record, run_dir = full
    page = rendered(record, run_dir)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert page.tags.count("svg") == 5
    assert all(reference.startswith("#") for reference in page.references)
    assert len(page.ids) == len(set(page.ids))
    source = (run_dir / "report.html").read_text()
    for reference in re.findall(r"url\(#([^)]+)\)", source) + [r[1:] for r in page.references]:
        assert reference in page.ids
    assert not re.search(r"https?://|@import|url\((?!#)", source)


def test_the_page_says_what_the_record_says(full):
    record, run_dir = full
    text = " ".join(" ".join(rendered(record, run_dir).text).split())
    for title in ("What was run", "Verdict", "Scores", "Comparisons", "Figures", "What was learned", "Warnings"):
        assert title in text
    for words in ("siblings", "no rotation beyond the null", "learned beats", "10 merges were tried", "landlock"):
        assert words in text
    assert record["models"]["base"]["sha256"][:12] in text
    assert "over problems" in text
    assert "of sampling" in text
    assert text.count("★ mean") == text.count("◆ min") == 1
    assert "hunter2" not in (run_dir / "report.html").read_text()


@pytest.mark.parametrize(("case", "present"), [("evidence_only", "Geometry"), ("merge_only", "merged/ties")])
def test_records_of_single_stages(case, present, request):
    record, run_dir = request.getfixturevalue(case)
    text = " ".join(rendered(record, run_dir).text)
    assert present in text
    assert "Scores" not in text
    assert "Comparisons" not in text


def test_what_stands_beside_kappa_and_every_part_have_tables(evidence_only):
    record, run_dir = evidence_only
    band = {"expert": "math", "side": "left", "start": 0.0, "stop": 0.1, "kappa": -0.02, "share": 0.5, "null": 0.51}
    pair = {
        "a": "math",
        "b": "code",
        "cosine": 0.048,
        "cosine_spread": 0.004,
        "generators": 0.03,
        "jaccard_noise": None,
    }
    record["geometry"] |= {
        "bands": [band | {"energy_ratio": 3.55, "angle_ratio": 1.81}],
        "suite": [{"expert": "math", "measure": "low_overlap", "update": 1.032, "noise": 1.029, "ratio": 1.003}],
        "pairs": [pair | {"commutator": 0.24, "commutator_null": 0.22, "jaccard": 0.9, "jaccard_random": 0.9}],
    }
    part = {
        "expert": "math",
        "part": "vectors",
        "energy": 0.97,
        "taken": 0.03,
        "score": 0.999,
        "low": 0.99,
        "high": 1.0,
    }
    control = {"control": "vectors_control", "difference": -0.012, "difference_low": -0.02, "difference_high": 0.0}
    record["function"] = {
        "rows": [
            part | control,
            part | {"part": "tangent", "accuracy": 0.625, "accuracy_low": None, "accuracy_high": None},
        ]
    }
    text = " ".join(rendered(record, run_dir).text)
    for shown in ("0 to 10", "3.55", "low overlap", "1.029", "0.048", "vectors", "−1.2", "62.5"):
        assert shown in text.replace("-1.2", "−1.2"), shown


def test_a_failed_run_says_why(failed):
    record, run_dir = failed
    text = " ".join(rendered(record, run_dir).text)
    assert record["error"] in text
    assert "failed" in text


def test_an_almost_empty_record_is_a_page(tmp_path):
    assert "demo" in " ".join(rendered({"name": "demo", "status": "running"}, tmp_path).text)


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def hostile(value, names):
    """The record with names and sentences that try to break out."""
    if isinstance(value, dict):
        return {names.get(key, key): hostile(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def test_everything_is_escaped(full):
    record, run_dir = full
    names = {name: f"{name}{HOSTILE}" for name in ("ties", "math", "tiny_code", "o")}
    record = hostile(record, names)
    record |= {"name": HOSTILE, "command": HOSTILE, "warnings": [HOSTILE], "error": HOSTILE}
    page = rendered(record, run_dir)  # its parser refuses event handlers and unbalanced tags
    assert not {"script", "img"} & set(page.tags)
    assert f"ties{HOSTILE}" in " ".join(page.text)


def test_the_page_is_the_same_every_time(full):
    record, run_dir = full
    figures.draw(record, run_dir)
    first = html.render(record, run_dir).read_bytes()
    assert html.render(record, run_dir).read_bytes() == first


PROBE = """<script>addEventListener("load", () => {
  const label = [...document.querySelectorAll("#tasks_scatter text")].find(t => t.textContent.trim() == "slerp");
  document.title = JSON.stringify([document.documentElement.scrollWidth, innerWidth, label.getBBox().width > 5]);
})</script>"""


def test_a_browser_shows_it_at_desktop_and_phone_width(full):
    record, run_dir = full
    page = rendered(record, run_dir)
    assert "svg" in page.tags
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:  # the parser above has checked what can be checked without one
        return
    source = (run_dir / "report.html").read_text()
    probed = run_dir / "probed.html"
    probed.write_text(re.sub(r"<meta http-equiv=[^>]*>", "", source).replace("</body>", f"{PROBE}</body>"))
    common = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    common += [f"--user-data-dir={run_dir / 'profile'}", "--disable-extensions"]
    for width in (1280, 500):
        size = f"--window-size={width},1400"
        dom = subprocess.run(
            [*common, size, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120
        )
        found = re.search(r"<title>\[(\d+),(\d+),(\w+)\]</title>", dom.stdout)
        assert found, dom.stderr[-500:]
        assert int(found[1]) <= int(found[2])  # nothing makes the page itself scroll sideways
        assert found[3] == "true"
        picture = run_dir / f"{width}.png"
        shot = [*common, size, f"--screenshot={picture}", (run_dir / "report.html").as_uri()]
        subprocess.run(shot, capture_output=True, timeout=120, check=True)
        assert len(Image.open(picture).convert("RGB").getcolors(1 << 20)) > 50
