"""What stands beside a score, in the page and in the terminal; a choice made on tasks of its own."""

import copy
import io

import pytest
from rich.console import Console

from rotrl.report import html, table
from rotrl.report.notes import notes
from rotrl.report.standings import standings
from rotrl.report.words import merge_words


@pytest.fixture
def noted(full):
    """A record with a band that is met, one that is missed, one that is not comparable, and a training window."""
    record, folder = copy.deepcopy(full[0]), full[1]
    about = {"source": "somebody 2025", "low": 0.9, "high": 0.95}
    record["published"] = [
        about | {"model": "math", "task": "tiny_math", "comparable": True, "words": "within the published 90 to 95"},
        about | {"model": "base", "task": "tiny_math", "comparable": True, "words": "below the published 90 to 95"},
        about
        | {"model": "code", "task": "tiny_code", "comparable": False, "words": "published 90 to 95, not comparable: n"},
    ]
    record["contaminated"] = [{"model": "ties", "task": "tiny_code", "words": "code was trained on tiny_code"}]
    for row in record["scores"]:
        if row["metric"].startswith("avg@"):
            row |= {"tokens": 1234.5, "truncated": 120, "score_published": 0.41, "disagreement": 0.031}
    return record, folder


def test_a_note_holds_shares_and_whether_a_band_is_met(noted):
    found = notes(noted[0])
    assert found["math", "tiny_math"].inside is True
    assert found["base", "tiny_math"].inside is False
    assert found["code", "tiny_code"].inside is None
    assert found["ties", "tiny_code"].contaminated
    assert found["ties", "tiny_math"].truncated == pytest.approx(120 / 1200)
    assert found["ties", "tiny_math"].tokens == 1234.5


def test_the_page_shows_it_beside_the_score(noted, tmp_path):
    page = html.render(noted[0], tmp_path).read_text()
    for text in ("within published 90–95", "outside published 90–95", "not comparable: published 90–95"):
        assert page.count(text) == 1
    assert page.count("† inside its training window") == 1
    assert "1,234 tokens, 10.0 % cut off" in page
    assert "published grader 41.0, 3.1 % differ" in page


def test_the_terminal_says_it_below_the_table(noted):
    out = io.StringIO()
    table.show(noted[0], Console(width=170, file=out))
    text = out.getvalue()
    assert "math, tiny_math: within the published 90 to 95" in text
    assert "base, tiny_math 10 %" in text
    row = next(line for line in text.splitlines() if line.startswith("ties"))
    assert "†" in row
    assert "1,234/1,234" in row
    assert "† trained on these problems" in " ".join(text.split())


def test_a_choice_made_on_one_task_is_reported_on_the_other(full):
    record = copy.deepcopy(full[0])
    record["config"]["evaluation"] = {"select": ["tiny_math"]}
    found = standings(record)
    assert found.reported == ("tiny_code",)
    merges = found.role("merge")
    assert found.best_mean is max(merges, key=lambda row: row.scores["tiny_math"].value)
    assert found.best_minimum is None
    assert all(row.mean.value == row.scores["tiny_code"].value for row in found.rows)
    assert found.best_expert.model == "code"
    words = " ".join(merge_words(found, record))
    assert words.startswith("Chosen on tiny_math and reported on tiny_code: ")
    assert "took no part in the choice" in words
    assert "optimistic" not in words
    out = io.StringIO()
    table.show(record, Console(width=120, file=out))
    assert "★ chosen on tiny_math" in " ".join(out.getvalue().split())
