"""What a record says, in sentences. A null result is said as one."""

from collections.abc import Mapping
from typing import Any

from rotrl.report.standings import Interval, Row, Standings, experts, method_target, number, paired, total


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def span(interval: Interval | None) -> str:
    """`80.1 to 84.9`, in percent."""
    return f"{percent(interval.low)} to {percent(interval.high)}" if interval and interval.known else ""


def plus_minus(interval: Interval) -> str:
    """`82.5 ±2.4`: percent and the larger half of the interval."""
    if interval.low is None or interval.high is None:
        return percent(interval.value)
    return f"{percent(interval.value)} ±{percent(max(interval.high - interval.value, interval.value - interval.low))}"


def points(interval: Interval | None) -> str:
    """`+2.4`: percentage points."""
    return "–" if interval is None else signed(100 * interval.value)


def points_span(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return ""
    return f"{signed(100 * interval.low)} to {signed(100 * interval.high)}"


def signed(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def lineage_words(record: Mapping[str, Any]) -> list[str]:
    """Who descends from whom; where the experts are no siblings, also what that does to each family of merges."""
    lineage = record.get("lineage") or {}
    words = [str(lineage["words"])] if lineage.get("words") else []
    return words + (consequences(record) if lineage.get("verdict") != "siblings" else [])


def consequences(record: Mapping[str, Any]) -> list[str]:
    found = (record.get("lineage") or {}).get("consequences") or {}
    return [f"{family}: {sentence}" for family, sentence in found.items()]


def function_words(record: Mapping[str, Any]) -> list[str]:
    """What the parts of the updates do, by KL to the expert."""
    return list((record.get("function") or {}).get("sentences") or [])


def geometry_words(record: Mapping[str, Any]) -> list[str]:
    """The stage's verdict, then the group of matrices nearest to a rotation, with its null beside it."""
    geometry = record.get("geometry") or {}
    words = [str(geometry["verdict"])] if geometry.get("verdict") else []
    trained = experts(record)
    rows = [row for row in geometry.get("rows") or [] if row.get("expert") in trained and row.get("module") != "all"]
    rows = [row for row in rows if number(row.get("kappa_median")) is not None]
    if rows:
        top = max(rows, key=lambda row: float(row["kappa_median"]))
        kappa = Interval(float(top["kappa_median"]), number(top.get("kappa_low")), number(top.get("kappa_high")))
        beside = f" ({signed(kappa.low, 3)} to {signed(kappa.high, 3)})" if kappa.known else ""
        words.append(
            f"Largest median kappa: {signed(kappa.value, 3)}{beside}, {top['expert']} {top['module']} {top['side']}: a "
            f"{top['side']} rotation explains {percent(number(top.get('share_median')))} % of the update, its null "
            f"{percent(number(top.get('null_median')))} % (kappa 0 = no more than the null, 1 = an exact rotation)."
        )
    return words


def merge_words(table: Standings, record: Mapping[str, Any]) -> list[str]:
    """The best merges, whether they beat the best single expert, and whether rotations beat the rest."""
    best, minimum = table.best_mean, table.best_minimum
    if best is None or best.mean is None:
        return []
    words = [f"{_how(table)}: {best.model}, {percent(best.mean.value)} % ({span(best.mean)})."]
    if minimum is not None and len(table.reported) > 1:
        also = "also " if minimum.model == best.model else ""
        words[0] += f" Best by minimum: {also}{minimum.model}, {percent(minimum.minimum)} % on its weaker task."
    words += [sentence for sentence in (_against_expert(best, table), _against_ceiling(best, table)) if sentence]
    words += [sentence for sentence in (_rotations(table, record), selection_words(table)) if sentence]
    return words


def _how(table: Standings) -> str:
    if not table.select:
        return "Best by mean"
    return f"Chosen on {', '.join(table.select)} and reported on {', '.join(table.reported)}"


def selection_words(table: Standings) -> str:
    """How many merges were tried, and what that does to the score of the best."""
    tried = len(table.role("merge"))
    if tried < 2:
        return ""
    if table.select:
        return (
            f"{tried} merges were tried and chosen from by {', '.join(table.select)} alone: the reported tasks took no "
            "part in the choice."
        )
    return (
        f"{tried} merges were tried and the best is picked on the same problems that score it: its score is "
        "optimistic, and a choice among them needs a set of its own."
    )


def _against_expert(best: Row, table: Standings) -> str:
    expert = table.best_expert
    if expert is None or expert.mean is None or best.mean is None:
        return ""
    name = f"the best single expert ({expert.model}, {percent(expert.mean.value)} %)"
    difference = best.versus
    if difference is None:
        return f"{best.model} and {name}: no paired comparison in this record."
    amount = f"{points(difference)} points ({points_span(difference)}, paired by problem)"
    if not difference.excludes_zero:
        return f"No merge can be told from {name}: {best.model} differs by {amount}. This is a null result."
    if difference.value < 0:
        return f"No merge reaches {name}: {best.model} differs by {amount}."
    return f"{best.model} beats {name} by {amount}."


def _against_ceiling(best: Row, table: Standings) -> str:
    if table.ceiling is None or best.mean is None or len(table.reported) < 2:
        return ""
    return (
        f"Each expert on its own task would give {percent(table.ceiling)} %: {best.model} stands at "
        f"{points(Interval(best.mean.value - table.ceiling))} points from there."
    )


def _rotations(table: Standings, record: Mapping[str, Any]) -> str:
    """Rows of merges are sorted by falling mean, so the first of each kind is its best."""
    merges = [row for row in table.role("merge") if row.mean]
    rotation = next((row for row in merges if row.rotation), None)
    other = next((row for row in merges if not row.rotation), None)
    if rotation is None or other is None or rotation.mean is None or other.mean is None:
        return ""
    difference, how = paired(rotation.model, other.model, record, table.reported), "paired by problem"
    if difference is None:
        difference, how = total([rotation.mean, -other.mean]), "not paired, so wider than need be"
    sentence = (
        f"The best merge by rotation, {rotation.model}, differs from the best other merge, {other.model}, by "
        f"{points(difference)} points ({points_span(difference)}, {how})."
    )
    if not difference.excludes_zero:
        return sentence + " The interval includes 0: a null result, rotations show no gain."
    if learned(rotation.model, record) and not learned(other.model, record):
        return (
            f"{sentence} {rotation.model} has learned from samples of the experts and {other.model} has not: the "
            "difference is no evidence for rotations."
        )
    return sentence


def learned(merge: str, record: Mapping[str, Any]) -> bool:
    """Whether a merge applies what this or another align stage has learned from the experts' samples."""
    if ((record.get("merges") or {}).get(merge) or {}).get("sampled"):
        return True
    return method_target(merge, record).rsplit(".", 1)[-1].startswith("learned")
