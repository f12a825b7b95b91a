"""What stands beside a score: tokens and truncation, published bands, training windows, the published grader."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rotrl.report.standings import OVERALL, number

VISIBLE = 0.01  # share of truncated samples that is told


@dataclass(frozen=True)
class Note:
    """Of a model's score on a task. `inside`: within its published band, None where they can't be compared."""

    truncated: float | None = None  # share of the samples that ended at the token limit
    unfinished: float | None = None  # share that never closed its thoughts
    tokens: float | None = None  # mean of a sample
    published: str = ""
    words: str = ""
    inside: bool | None = None
    contaminated: str = ""
    published_grader: float | None = None  # the same samples by the grader of the publication
    disagreement: float | None = None


Notes = Mapping[tuple[str, str], Note]  # by model and task


def notes(record: Mapping[str, Any]) -> dict[tuple[str, str], Note]:
    """The notes of every avg@n in a record."""
    bands = {(row["model"], row["task"]): row for row in record.get("published") or []}
    windows = {(row["model"], row["task"]): row["words"] for row in record.get("contaminated") or []}
    found = {}
    for row in record.get("scores") or []:
        place = str(row["model"]), str(row["task"])
        if not str(row.get("metric")).startswith("avg@") or place[1] in OVERALL:
            continue
        samples, band = number(row.get("samples")) or 0.0, bands.get(place)
        cut, open_ended = number(row.get("truncated")), number(row.get("unfinished"))
        found[place] = Note(
            truncated=cut / samples if samples and cut is not None else None,
            unfinished=open_ended / samples if samples and open_ended is not None else None,
            tokens=number(row.get("tokens")),
            published=_band(band) if band else "",
            words=f"{band['words']} ({band['source']})" if band else "",
            inside=str(band["words"]).startswith("within") if band and band["comparable"] else None,
            contaminated=windows.get(place, ""),
            published_grader=number(row.get("score_published")),
            disagreement=number(row.get("disagreement")),
        )
    return found


def _band(band: Mapping[str, Any]) -> str:
    ends = [f"{100 * band[key]:g}" for key in ("low", "high")]
    return "–".join(dict.fromkeys(ends))


def note_words(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """Sentences for the terminal: scores that the token limit shaped, published bands, what a model was trained on."""
    shares = {place: note.truncated or 0.0 for place, note in notes(record).items()}
    cut = [f"{model}, {task} {100 * share:.0f} %" for (model, task), share in shares.items() if share >= VISIBLE]
    published = [f"{row['model']}, {row['task']}: {row['words']}" for row in record.get("published") or []]
    trained = [f"{row['model']}, {row['task']}: {row['words']}" for row in record.get("contaminated") or []]
    limit = [f"by the token limit: {'; '.join(cut)}"] if cut else []
    return {"cut off": limit, "published": published, "contaminated": trained}
