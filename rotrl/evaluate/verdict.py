"""What a grader says about one completion."""

from dataclasses import dataclass

WORDS = (
    "accepted",
    "wrong answer",
    "time limit",
    "memory limit",
    "runtime error",
    "compile error",
    "no code",
    "no answer",
    "grader timeout",
    "grader error",
    "sandbox error",
)
UNGRADABLE = frozenset({"grader timeout", "grader error", "sandbox error"})


@dataclass(frozen=True)
class Verdict:
    """`correct` is None where the grader failed, not the model: such samples are excluded and raise an alarm.

    `grader` names what judged, such as "math:integer" or "code:landlock"; `detail` is one short line for people.
    `published` is whether the protocol's own grader takes it; None where there is none or it failed.
    """

    verdict: str
    correct: bool | None
    grader: str
    detail: str = ""
    published: bool | None = None

    @classmethod
    def of(cls, word: str, grader: str, detail: str = "", published: bool | None = None) -> "Verdict":
        if word not in WORDS:
            raise ValueError(f"{word!r} is no verdict")
        return cls(word, None if word in UNGRADABLE else word == "accepted", grader, detail, published)
