"""The finished card of every merge: its own card unchanged, then the table of all models and the report's sentences."""

import pytest
from huggingface_hub import ModelCard
from rich.table import Table

from rotrl.checkpoint.reader import open_checkpoint
from rotrl.checkpoint.sidecar import CARD, write_card
from rotrl.report.card import write_cards
from rotrl.report.table import markdown
from rotrl.zoo import zoo_path


@pytest.fixture
def evaluated(full):
    """(record, run_dir) with a real card in the folder of each merge."""
    record, folder = full
    models = [open_checkpoint(zoo_path(name)) for name in ("base", "math", "code")]
    for label, made in record["merges"].items():
        made["path"] = str(folder / "merged" / label)
        (folder / "merged" / label).mkdir(parents=True)
        told = {"title": label, "method": label, "models": models, "configuration": "merge: x\n", "facts": {"a": "b"}}
        write_card(folder / "merged" / label, **told)
    record["config"]["protocol"] = {"name": "tiny", "temperature": 1.0, "max_tokens": 40}
    return record, folder


def rows(card):
    lines = [line for line in card.text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].split(" ")[0]: row[1:] for row in cells if len(row) > 2}


def test_every_merge_has_its_card_with_the_whole_table(evaluated):
    record, folder = evaluated
    before = {path: path.read_bytes() for path in folder.rglob(CARD)}
    written = write_cards(record, folder)
    assert sorted(path.stem for path in written) == sorted(record["merges"])
    assert {path.parent for path in written} == {folder / "model_cards"}
    assert {path: path.read_bytes() for path in folder.rglob(CARD)} == before
    scores = {(r["model"], r["task"]): r for r in record["scores"] if r["metric"] == "avg@8"}
    for path in written:
        card, own = ModelCard.load(path), ModelCard.load(folder / "merged" / path.stem / CARD)
        assert card.data.to_dict() == own.data.to_dict()
        assert card.content.startswith(own.content.rstrip())
        assert f"`{path.stem}` is this model; avg@n in percent" in card.text
        table = rows(card)
        assert table["model"][:3] == ["tiny_math avg@8", "tiny_code avg@8", "mean"]
        assert set(table) == {"model", "---", "base", "math", "code", *record["merges"]}
        for (model, task), score in scores.items():
            found = table[model][0 if task == "tiny_math" else 1]
            assert found == f"{100 * score['value']:.1f} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"
        for text in ("learned ★◆", "10 merges were tried", "Protocol tiny: temperature 1.0, max_tokens 40."):
            assert text in card.text


def test_what_shapes_the_scores_is_told_and_no_secret_is(evaluated):
    record, folder = evaluated
    record["contaminated"] = [{"model": "math", "task": "tiny_math", "words": "trained on it, api_key=hunter2hunter2"}]
    for path in write_cards(record, folder):
        text = path.read_text()
        assert "- contaminated: math, tiny_math: trained on it" in text
        assert "† trained on these problems" in text
        assert "hunter2" not in text


def test_merges_without_scores_have_the_card_that_they_have(merge_only):
    record, folder = merge_only
    assert write_cards(record, folder) == []
    assert not (folder / "model_cards").exists()


def test_markdown_of_a_table_survives_its_own_signs():
    view = Table("a|b", "two\nlines")
    view.add_column("number", justify="right")
    view.add_row("x|y", "z", "1")
    assert markdown(view) == "| a\\|b | two lines | number |\n| --- | --- | ---: |\n| x\\|y | z | 1 |"
