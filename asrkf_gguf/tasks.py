"""Tasks for the bench: what is hidden in a long prompt, and what is asked at its end.

Four are our own (passkey-filler, passkey-text, five-facts, early-fact), and many-turns, where facts are told in the turns of a
conversation. The other five are built after RULER's (Hsieh et al. 2024, arXiv 2404.06654), in our own words: one needle, one of four
needles, a needle of four values, a chain of variables, and the words of a list that come most often.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Question(NamedTuple):
    """What is asked, its completion form, and all answers that it wants."""

    text: str
    stem: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Needle:
    """Sentences to hide, each at a depth (0 start, 1 end), and what is asked afterwards."""

    sentences: tuple[tuple[float, str], ...]
    questions: tuple[Question, ...]

    def hide(self, haystack: str) -> str:
        """The haystack with each sentence after the sentence end that follows its depth."""
        for depth, sentence in sorted(self.sentences, reverse=True):
            at = haystack.find(". ", int(depth * len(haystack))) + 2
            at = at if at >= 2 else len(haystack)
            haystack = f"{haystack[:at].rstrip(' ')} {sentence} {haystack[at:]}"
        return haystack


@dataclass(frozen=True)
class WordList(Needle):
    """No text: a numbered list, in which the answers come about ten times as often as the other words (less in short lists)."""

    others: tuple[str, ...] = ()

    def hide(self, haystack: str) -> str:
        """A list about as long as the haystack."""
        common = self.questions[0].answers
        n_words = len(haystack) // 11  # number, point, word and blank
        n_common = max(3, n_words * 3 // (8 * len(common)))
        n_other = max(1, n_common // 10)
        rest = max(0, n_words - n_common * len(common))
        words = [word for word in common for _ in range(n_common)] + [word for word in self.others for _ in range(n_other)][:rest]
        random.Random(" ".join(common)).shuffle(words)
        return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


@dataclass(frozen=True)
class Task:
    """One kind of prompt."""

    make: Callable[[random.Random, float, str], Needle]
    """Of dice, the part of the task's prompts that came before (0 to 1), and the text that it will be hidden in."""
    n_questions: int = 1
    """That share a prompt."""
    n_answer_tokens: int = 12
    preface: str = ""
    in_filler: bool = False
    """Hidden in sentences that repeat, instead of a text."""
    form: str = "completion"
    """How is asked: the stem is to be completed; "chat": the question alone, in the model's chat template; "turns": sentences are the
    user's turns in a conversation, in the template, and the answer begins with the stem."""


FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_PASSKEY_PREFACE = "There is important information hidden inside a lot of irrelevant text. Find it and memorize it.\n\n"
_CHAIN_PREFACE = (
    "Variables are set in the text below. A variable that is set to another one holds what that one holds.\n\n"
    "Example: VAR JUMPY = 10417. VAR TOWEL = VAR JUMPY. The variables that hold 10417 are: JUMPY, TOWEL.\n\n"
)
_WORDS_PREFACE = (
    "Some words come more often than others in the list below.\n\n"
    "Example: 1. lemon 2. chair 3. lemon 4. river 5. chair 6. lemon 7. chair 8. cloud. The words that come most often are: lemon, chair.\n\n"
)
_ATTRIBUTES = ("code word", "family name", "favourite drink", "lucky colour", "ship")
_OWNERS = (
    "Orlen Tavish", "Brask Holloway", "Prisca Dunmore", "Kessel Varga", "Moroth Quill", "Halvern Stroud", "Ysolde Penrick", "Corvin Ashby",
)  # fmt: skip
_VALUES = (
    "copper", "violet", "lantern", "marble", "saffron", "thistle", "walnut", "cobalt", "juniper", "falcon",
    "amber", "pepper", "harbour", "ginger", "velvet",
)  # fmt: skip
_N_COMMON_WORDS, _N_OTHER_WORDS = 10, 400


def is_found(answer: str, output: str) -> bool:
    """Whether the answer is in the output as a whole word or number; 12,345 is 12345."""
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", output)
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", plain, re.IGNORECASE) is not None


def found_ratio(answers: tuple[str, ...], output: str) -> float:
    """The part of the answers that is in the output."""
    return sum(is_found(answer, output) for answer in answers) / len(answers)


def make_needles(name: str, n_questions: int, source: str = "", seed: int = 0) -> list[Needle]:
    """Needles of a task, with n_questions questions in all (rounded up to whole prompts), depths spread over 10..90 %.

    early-fact keeps to the first 10 %. Five-facts and many-turns have ten decoys a prompt: the same owner or attribute in another pair.
    source: a text whose words common-words takes.
    """
    task, dice = TASKS[name], random.Random(f"{name} {seed}")
    n_prompts = -(-n_questions // task.n_questions)
    return [task.make(dice, i / max(1, n_prompts - 1), source) for i in range(n_prompts)]


def _passkey(dice: random.Random, part: float, _source: str) -> Needle:
    key = str(dice.randrange(10_000, 100_000))
    question = Question("What is the pass key?", "The pass key is", (key,))
    return Needle(((0.1 + 0.8 * part, f"The pass key is {key}. Remember it. {key} is the pass key."),), (question,))


def _fact(attribute: str, owner: str, value: str) -> tuple[str, Question]:
    stem = f"The {attribute} of {owner} is"
    return f"{stem} {value}.", Question(f"What is the {attribute} of {owner}?", stem, (value,))


def _early_fact(dice: random.Random, part: float, _source: str) -> Needle:
    sentence, question = _fact(dice.choice(_ATTRIBUTES), dice.choice(_OWNERS), dice.choice(_VALUES))
    return Needle(((0.02 + 0.07 * part, sentence),), (question,))


def _five_facts(dice: random.Random, _part: float, _source: str) -> Needle:
    pairs = [(attribute, owner) for attribute in _ATTRIBUTES for owner in _OWNERS]
    values = dice.sample(_VALUES, 15)
    facts = [_fact(*pair, value) for pair, value in zip(dice.sample(pairs, 15), values, strict=True)]
    depths = [0.1 + 0.2 * i for i in range(5)] + [dice.uniform(0.05, 0.95) for _ in range(10)]
    sentences = tuple((depth, sentence) for depth, (sentence, _) in zip(depths, facts, strict=True))
    return Needle(sentences, tuple(question for _, question in facts[:5]))


def _numbers(dice: random.Random, n: int) -> list[str]:
    return [str(number) for number in dice.sample(range(10_000, 100_000), n)]


def _keys(dice: random.Random, n: int) -> list[str]:
    return [f"{colour} {thing}" for colour, thing in (dice.sample(_VALUES, 2) for _ in range(n))]


def _one_needle(dice: random.Random, part: float, _source: str) -> Needle:
    return _numbered(dice, [0.1 + 0.8 * part])


def _four_needles(dice: random.Random, _part: float, _source: str) -> Needle:
    return _numbered(dice, [dice.uniform(0.1, 0.9) for _ in range(4)])


def _numbered(dice: random.Random, depths: list[float]) -> Needle:
    """One key and number for each depth, and a question for each."""
    keys: list[str] = []
    while len(set(keys)) < len(depths):
        keys = _keys(dice, len(depths))
    stems = [f"The locker number of {key} is" for key in keys]
    numbers = _numbers(dice, len(depths))
    sentences = [f"{stem} {number}." for stem, number in zip(stems, numbers, strict=True)]
    questions = [
        Question(f"What is the locker number of {key}?", stem, (number,)) for key, stem, number in zip(keys, stems, numbers, strict=True)
    ]
    return Needle(tuple(zip(depths, sentences, strict=True)), tuple(questions))


def _four_values(dice: random.Random, _part: float, _source: str) -> Needle:
    (key,), numbers = _keys(dice, 1), _numbers(dice, 4)
    sentences = tuple((dice.uniform(0.1, 0.9), f"One locker number of {key} is {number}.") for number in numbers)
    return Needle(sentences, (Question(f"What are the four locker numbers of {key}?", f"The four locker numbers of {key} are", tuple(numbers)),))


def _chain(dice: random.Random, _part: float, _source: str) -> Needle:
    """Four variables, each but the first set to the one before it."""
    names = ["".join(dice.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 5)) for _ in range(4)]
    (number,) = _numbers(dice, 1)
    depths = sorted(dice.uniform(0.1, 0.9) for _ in names)
    set_to = [number, *(f"VAR {name}" for name in names[:-1])]
    sentences = tuple((depth, f"VAR {name} = {value}.") for depth, name, value in zip(depths, names, set_to, strict=True))
    stem = f"The four variables that hold {number} are:"
    return Needle(sentences, (Question(f"Which four variables hold {number}?", stem, tuple(names)),))


def _common_words(dice: random.Random, _part: float, source: str) -> Needle:
    words = [word for word, _ in Counter(re.findall(r"\b[a-z]{4,8}\b", source)).most_common(2 * _N_OTHER_WORDS)]
    if len(words) < 2 * _N_COMMON_WORDS:
        raise ValueError(f"task common-words: a text of {len(source)} characters has {len(words)} words of 4 to 8 letters: a longer one")
    dice.shuffle(words)
    common, others = words[:_N_COMMON_WORDS], words[_N_COMMON_WORDS:][:_N_OTHER_WORDS]
    question = Question("Which ten words come most often?", "The words that come most often are:", tuple(common))
    return WordList((), (question,), tuple(others))


TASKS = {
    "passkey-filler": Task(_passkey, preface=_PASSKEY_PREFACE, in_filler=True),  # a small model completes it, and answers no question about it
    "passkey-text": Task(_passkey, form="chat"),
    "five-facts": Task(_five_facts, n_questions=5),
    "early-fact": Task(_early_fact),
    "many-turns": Task(_five_facts, n_questions=5, form="turns"),
    "niah-single": Task(_one_needle),
    "niah-multikey": Task(_four_needles, n_questions=4),
    "niah-multivalue": Task(_four_values, n_answer_tokens=48),
    "variable-tracking": Task(_chain, n_answer_tokens=48, preface=_CHAIN_PREFACE, in_filler=True),
    "common-words": Task(_common_words, n_answer_tokens=64, preface=_WORDS_PREFACE),
}
