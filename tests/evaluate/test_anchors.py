"""Published scores and training windows."""

import pytest

from rotrl.evaluate.anchors import anchors, beside, contamination, published_merges

PROTOCOL = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 32768}
BASE = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
CODER = "agentica-org/DeepCoder-1.5B-Preview"
V5, V6, V2 = ("2024-08-01", "2025-02-01"), ("2025-02-01", "2025-05-01"), ("2023-05-01", "2024-06-01")


@pytest.mark.parametrize(
    "model",
    [
        BASE,
        f"{BASE}@ad9f0ae",
        "/models/deepseek-r1-distill-qwen-1.5b",
        "/cache/models--deepseek-ai--DeepSeek-R1-Distill-Qwen-1.5B/snapshots/ad9f0ae",
    ],
)
def test_a_model_is_known_by_the_last_part_of_its_id(model):
    (found,) = anchors(model, "aime24", PROTOCOL)
    assert (found.low, found.high, found.differs) == (0.285, 0.31, "")


def test_unknown_models_tasks_and_windows_have_no_anchor():
    assert anchors("rotrl/merged", "aime24") == []
    assert anchors(BASE + "-GGUF", "aime24") == []
    assert anchors(BASE, "tiny_math") == []
    assert anchors(BASE, "livecodebench", window=V2) == []
    assert len(anchors(BASE, "livecodebench", window=V5)) == 1


def test_a_score_is_placed_by_its_interval():
    (found,) = anchors(BASE, "aime24", PROTOCOL)
    assert found.place(0.27, 0.29) == "within the published 28.5 to 31"
    assert found.place(0.20, 0.28) == "below the published 28.5 to 31"
    assert found.place(0.32, 0.35) == "above the published 28.5 to 31"


def test_other_settings_are_not_compared():
    (found,) = anchors(BASE, "aime24", {**PROTOCOL, "temperature": 0.7, "top_p": 1.0})
    assert found.place(0, 1) == (
        "published 28.5 to 31, not comparable: temperature 0.7 where 0.6 was published, "
        "top_p 1 where 0.95 was published"
    )
    (found,) = anchors(BASE, "aime24", {**PROTOCOL, "max_tokens": 65536})
    assert not found.differs
    (found,) = anchors(BASE, "aime24", {**PROTOCOL, "max_tokens": 8192})
    assert "max_tokens" in found.differs


def test_the_comparable_publication_comes_first_and_unknown_settings_are_not_comparable():
    archer = "Fate-Zero/Archer2.0-Code-1.5B-Preview"
    warm, other = anchors(archer, "livecodebench", {**PROTOCOL, "temperature": 0.8}, V5)
    assert (warm.low, warm.differs) == (0.315, "")
    assert (other.low, other.differs) == (0.269, "its sampling settings are not known")
    assert all(anchor.differs for anchor in anchors(archer, "livecodebench", PROTOCOL, V5))
    (later,) = anchors(archer, "livecodebench", None, V6)
    assert later.low == 0.305


def test_the_published_merges_are_those_of_exactly_these_experts():
    pair = ["hbx/JustRL-DeepSeek-1.5B", "Fate-Zero/Archer2.0-Code-1.5B-Preview"]
    assert published_merges(pair, "aime24")["ties"] == pytest.approx(0.545)
    assert published_merges(pair[:1], "aime24") == {}
    assert published_merges([*pair, CODER], "aime24") == {}
    assert published_merges(pair, "math500") == {}


def test_a_training_window_marks_the_scores_that_it_overlaps():
    assert contamination([CODER], "livecodebench", V5) == []
    (words,) = contamination([BASE, CODER], "livecodebench", V2)
    assert "DeepCoder-1.5B-Preview was trained on livecodebench from 2023-05-01" in words
    assert contamination([CODER], "livecodebench", ("2024-07-31", None)) != []
    assert contamination([CODER], "livecodebench") != []
    assert contamination([BASE], "livecodebench", V2) == []
    assert contamination([CODER], "aime24") == []


IDS = {"base": BASE, "math": "/models/DeepScaleR-1.5B-Preview", "code": CODER}
NODES = {"aime24": {"problems": 30}, "livecodebench": {"problems": 511, "start": V2[0], "end": V2[1]}}


def scored(model, task, metric="avg@64", problems=30, low=0.40, high=0.42):
    return {
        "model": model,
        "task": task,
        "metric": metric,
        "problems": problems,
        "sampling_low": low,
        "sampling_high": high,
    }


def test_scores_stand_beside_their_bands_and_windows():
    rows = [scored("math", "aime24"), scored("base", "aime24"), scored("ties", "aime24"), scored("math", "mean")]
    rows += [scored("math", "aime24", "pass@8"), scored("code", "livecodebench", "avg@8", 511)]
    rows += [scored("ties", "livecodebench", "avg@8", 511), scored("base", "livecodebench", "avg@8", 511)]
    found = beside(rows, IDS, ["ties"], NODES, PROTOCOL)
    assert [(row["model"], row["task"], row["words"]) for row in found["published"]] == [
        ("math", "aime24", "within the published 40 to 43"),
        ("base", "aime24", "above the published 28.5 to 31"),
    ]
    assert all(row["comparable"] for row in found["published"])
    assert [(row["model"], row["task"]) for row in found["contaminated"]] == [
        ("code", "livecodebench"),
        ("ties", "livecodebench"),  # of its expert
    ]


def test_few_samples_and_part_of_a_set_are_not_compared():
    (row,) = beside([scored("math", "aime24", "avg@4", 12)], IDS, [], NODES, PROTOCOL)["published"]
    assert not row["comparable"]
    assert row["words"] == "published 40 to 43, not comparable: n 4 where 16 are needed, 12 of 30 problems"


def test_a_published_merge_stands_beside_one_of_the_same_experts():
    ids = {"base": BASE, "math": "hbx/JustRL-DeepSeek-1.5B", "code": "Fate-Zero/Archer2.0-Code-1.5B-Preview"}
    (row,) = beside([scored("ties", "aime24")], ids, ["ties"], NODES, PROTOCOL)["published"]
    assert (row["low"], row["comparable"]) == (pytest.approx(0.545), False)


def test_a_model_below_a_folder_of_a_known_name_is_not_that_model():
    assert anchors("/runs/DeepScaleR-1.5B-Preview/step_100", "aime24") == []
    assert len(anchors("/models/DeepScaleR-1.5B-Preview/", "aime24")) == 1
