"""Facts hidden in long prompts: how many each side finds."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import Any, Optional

import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from tabulate import tabulate
from tqdm import tqdm

from ..llama import Llama
from ..stats import MIB
from ..tasks import FILLER, TASKS, Needle, Question, found_ratio, make_needles
from ..texts import load_texts
from .measure import Bar, clear, feed, last_logits
from .records import DESCRIPTION, Table, describe, results_file, run_key
from .sides import CELLS, REFERENCE, Side, chosen_sides, config_text, open_side, read_counters, require_frozen

ANSWER_TOKENS = 12
PROMPTS = "v2"  # of what is written around needles: raise it with any change of tasks.py or of the prompts below
SOLVED_RATIO = 2 / 3  # what the full cache has to find of a task, where the judge compares sides in it
OWN_TASKS = ("passkey-filler", "passkey-text", "five-facts", "early-fact")  # what is asked unless tasks are named
NEEDLES = [*DESCRIPTION, "texts", "task", "length", "side", "config", "type", "found", "asked", "device_bytes", "rewalks", "answers", "run"]


@dataclass(frozen=True)
class Asked:
    """A prompt, tokens fed one by one after it as if generated, tokens of the question after them, and what is to be found."""

    prompt: list[int]
    generated: list[int]
    question: list[int]
    answers: tuple[str, ...]
    n_answer_tokens: int

    def n_tokens(self) -> int:
        return len(self.prompt) + len(self.generated) + len(self.question) + self.n_answer_tokens


def chat_prompt(llm: Llama, messages: list[dict[str, str]]) -> str:
    """The messages, user's first, in the model's own chat template up to where the answer begins; plainly if it has none."""
    template = llm.metadata.get("tokenizer.chat_template")
    if not template:
        if len(messages) == 1:
            return f"{messages[0]['content']}\nAnswer:"
        return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages) + "\n\nAssistant:"
    vocab = llama_cpp.llama_model_get_vocab(llm.model)

    def text_of(token: int) -> str:
        return llama_cpp.llama_vocab_get_text(vocab, token).decode() if token != -1 else ""

    bos, eos = text_of(llm.token_bos()), text_of(llm.token_eos())
    return Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos)(messages=messages).prompt  # type: ignore[arg-type]


def turns_of(needle: Needle, haystack: str, question: str) -> list[dict[str, str]]:
    """A conversation: in each turn of the user's one sentence, in each answer the part of the haystack up to the next one."""
    told = sorted(needle.sentences)
    ends = [haystack.find(". ", int(depth * len(haystack))) + 1 or len(haystack) for depth, _ in told]
    parts = [haystack[begin:end].strip() for begin, end in itertools.pairwise([0, *ends, len(haystack)])]
    messages = [{"role": "user", "content": "Let us read something together."}, {"role": "assistant", "content": parts[0]}]
    for (_, sentence), part in zip(told, parts[1:], strict=True):
        messages += [{"role": "user", "content": f"Remember this: {sentence} Go on, please."}, {"role": "assistant", "content": part or "Yes."}]
    return [*messages, {"role": "user", "content": question}]


def prompt_tokens(llm: Llama, prompt: str) -> list[int]:
    tokens = llm.tokenize(prompt.encode(), add_bos=True, special=True)
    return tokens[1:] if tokens[:2] == [llm.token_bos()] * 2 else tokens  # some templates write it themselves


def needle_prompts(llm: Llama, name: str, needle: Needle, source: str, length: int, positions: int) -> list[Asked]:
    """One for each question. Each takes at most `length` tokens, its answer included; as many of the source as that allows."""
    n_generated = positions if name == "early-fact" else 0
    tokens = llm.tokenize(source[: length * 10].encode(), add_bos=False)
    n_haystack, longest = length - n_generated + 1, length + 1
    while longest > length:  # what is hidden, asked and written around it is counted by writing it; a token of a haystack may become several
        n_haystack -= max(1, (longest - length) * n_haystack // longest)
        if n_haystack < CELLS or len(tokens) < n_haystack + n_generated:
            raise ValueError(f"task {name}: no haystack for {length} tokens in a text of {len(tokens)}: change --length, --positions or --text")
        haystack = llm.detokenize(tokens[:n_haystack]).decode(errors="ignore").strip()
        asked = [write_prompt(llm, name, needle, haystack, question, tokens[n_haystack : n_haystack + n_generated]) for question in needle.questions]
        longest = max(one.n_tokens() for one in asked)
    return asked


def write_prompt(llm: Llama, name: str, needle: Needle, haystack: str, question: Question, generated: list[int]) -> Asked:
    task = TASKS[name]
    if task.form == "turns":
        prompt = f"{chat_prompt(llm, turns_of(needle, haystack, question.text))} {question.stem}"
    elif task.form == "chat":
        message = f"{needle.hide(haystack)}\n\n{question.text} Answer with the number only."
        prompt = chat_prompt(llm, [{"role": "user", "content": message}])
    else:
        asked = question.stem if task.in_filler else f"{question.text} {question.stem}"
        space = " " if task.in_filler else "\n\n"
        prompt = f"{task.preface}{needle.hide(haystack)}" + ("" if generated else f"{space}{asked}")
    after = llm.tokenize(f"\n\n{question.text} {question.stem}".encode(), add_bos=False) if generated else []
    return Asked(prompt_tokens(llm, prompt), generated, after, question.answers, task.n_answer_tokens)


def answer_greedily(llm: Llama, n_tokens: int = ANSWER_TOKENS) -> str:
    tokens: list[int] = []
    while len(tokens) < n_tokens:
        token = int(last_logits(llm).argmax())
        if token == llm.token_eos():
            break
        tokens.append(token)
        llm.eval([token])
    return llm.detokenize(tokens).decode(errors="replace")


def ask(llm: Llama, asked: Asked, bar: Optional[Bar] = None) -> str:
    """The answer. What the cache still holds of the prompt is used again; what a short context cannot hold is left out."""
    prompt = asked.prompt[max(0, asked.n_tokens() - llm.n_ctx()) :]
    if not prompt:
        raise ValueError(f"{llm.n_ctx()} cells hold no prompt before {len(asked.generated)} generated tokens: raise the pool or lower --positions")
    shared = 0
    while shared < min(llm.n_tokens, len(prompt) - 1) and llm.input_ids[shared] == prompt[shared]:
        shared += 1
    llm.n_tokens = shared  # the next eval cuts the cache back to it
    if bar is not None:
        bar.update(shared)
    feed(llm, prompt[shared:], bar)
    for token in asked.generated:
        feed(llm, [token], bar)
    if asked.question:
        feed(llm, asked.question, bar)
    return answer_greedily(llm, asked.n_answer_tokens)


class Needles:
    """One run of `needles`: sides by lengths by tasks; one context per side and length."""

    def __init__(self, arguments: argparse.Namespace, texts: dict[str, str], sides: list[Side], tasks: list[str]) -> None:
        self.arguments, self.texts, self.sides, self.tasks = arguments, texts, sides, tasks
        self.table = Table(arguments.out or results_file("needles.csv"), NEEDLES, arguments.again)
        self.description = describe(arguments)
        digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
        self.runs = {
            (length, side, task): run_key(
                side, length, arguments, task=[task, PROMPTS], texts=digest, needles=arguments.needles, positions=arguments.positions,
                **({"gives_up": True} if self.gives_up(side) else {}),
            )
            for length in arguments.length for side in sides for task in tasks
        }  # fmt: skip
        self.rows = {key: row for key, run in self.runs.items() if (row := self.table.find(run))}

    def gives_up(self, side: Side) -> bool:
        """Whether the full cache's run of a task ends where it cannot solve SOLVED_RATIO of it any more: no other side is asked then."""
        return side == REFERENCE and getattr(self.arguments, "gives_up", False)

    def run(self) -> None:
        missing = [key for key in self.runs if key not in self.rows]
        with tqdm(total=sum(length * self.arguments.needles for length, _, _ in missing), unit="tok", desc="needles", disable=None) as bar:
            for (length, side), keys in itertools.groupby(missing, key=lambda key: key[:2]):
                with contextlib.closing(open_side(side, length, self.arguments)) as llm:
                    for key in keys:
                        bar.set_description(f"{side.name} {length} {key[2]}")
                        about = {"texts": "+".join(self.texts), "task": key[2], "length": length, "side": side.name, "type": side.type}
                        figures = self.ask_all(llm, side, key[2], length, bar)
                        self.rows[key] = {**self.description, **about, "config": config_text(llm), **figures, "run": self.runs[key]}
                        self.table.add(self.rows[key])

    def ask_all(self, llm: Llama, side: Side, task: str, length: int, bar: tqdm) -> dict[str, Any]:
        """Figures of one task; the questions on one haystack share its prompt. A question counts by the part of its answers that was found."""
        answers: list[list[str]] = []
        found, rewalks = 0.0, 0
        all_texts = list(self.texts.values())
        made = make_needles(task, self.arguments.needles, all_texts[0])
        n_questions = sum(len(needle.questions) for needle in made)
        for i, needle in enumerate(made):
            if self.gives_up(side) and len(answers) - found > (1 - SOLVED_RATIO) * n_questions:
                break
            text = all_texts[i % len(all_texts)]
            begin = int(len(text) * (0.2 + 0.5 * i / len(made)))
            source = FILLER * (length // 8) if TASKS[task].in_filler else text[text.find(". ", begin) + 2 :]
            clear(llm)
            for asked in needle_prompts(llm, task, needle, source, length, self.arguments.positions):
                output = ask(llm, asked, bar)
                found += found_ratio(asked.answers, output)
                answers.append([*asked.answers, output])
            stats = read_counters(llm)
            require_frozen(side, length, stats)
            rewalks += stats["rewalks_total"]
        figures = {"found": f"{found:.4g}", "asked": len(answers), "device_bytes": stats["device_bytes"], "rewalks": rewalks}
        return {**figures, "answers": json.dumps(answers)}


def needles(arguments: argparse.Namespace) -> int:
    sides, tasks = chosen_sides(arguments), arguments.task or list(OWN_TASKS)
    run = Needles(arguments, load_texts(arguments.text), sides, tasks)
    run.run()
    lines = []
    for length in arguments.length:
        for side in sides:
            counts = [f"{run.rows[length, side, task]['found']} of {run.rows[length, REFERENCE, task]['found']}" for task in tasks]
            lines.append([length, side.name, int(run.rows[length, side, tasks[0]]["device_bytes"]) / MIB, *counts])
    print(tabulate(lines, ["length", "side", "device MiB", *tasks], floatfmt=".1f", colalign=("right", "left", "right", *["right"] * len(tasks))))
    print("found of what the full cache finds")
    print(f"rows in {run.table.path}")
    return 0
