"""Facts hidden in long prompts: how many each side finds."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
from typing import Any, Optional

import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from tabulate import tabulate
from tqdm import tqdm

from ..llama import Llama
from ..stats import MIB
from ..texts import FILLER, NEEDLE_TASKS, PASSKEY_PREFACE, Needle, is_found, load_texts, make_needles
from .measure import Bar, clear, feed, last_logits
from .records import DESCRIPTION, Table, describe, results_file, run_key
from .sides import CELLS, REFERENCE, Side, chosen_sides, config_text, open_side, read_counters, require_frozen

ANSWER_TOKENS = 12
QUESTION_TOKENS = 128  # room for question, chat template, and a haystack that takes more tokens when it is put together
NEEDLES = [*DESCRIPTION, "texts", "task", "length", "side", "config", "type", "found", "asked", "device_bytes", "rewalks", "answers", "run"]


def chat_prompt(llm: Llama, message: str) -> str:
    """The message in the model's own chat template; as a plain question if it has none."""
    template = llm.metadata.get("tokenizer.chat_template")
    if not template:
        return f"{message}\nAnswer:"
    vocab = llama_cpp.llama_model_get_vocab(llm.model)

    def text_of(token: int) -> str:
        return llama_cpp.llama_vocab_get_text(vocab, token).decode() if token != -1 else ""

    bos, eos = text_of(llm.token_bos()), text_of(llm.token_eos())
    return Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos)(messages=[{"role": "user", "content": message}]).prompt


def prompt_tokens(llm: Llama, prompt: str) -> list[int]:
    tokens = llm.tokenize(prompt.encode(), add_bos=True, special=True)
    return tokens[1:] if tokens[:2] == [llm.token_bos()] * 2 else tokens  # some templates write it themselves


def needle_prompts(
    llm: Llama, task: str, needle: Needle, source: str, length: int, positions: int
) -> list[tuple[list[int], list[int], list[int], str]]:
    """For each question: prompt, tokens fed one by one as if generated, tokens of the question after them, answer.

    Together with the answer they take at most `length` tokens.
    """
    n_generated = positions if task == "early-fact" else 0
    hidden = sum(len(llm.tokenize(sentence.encode(), add_bos=False)) for _, sentence in needle.sentences)
    n_haystack = length - n_generated - hidden - QUESTION_TOKENS - ANSWER_TOKENS
    tokens = llm.tokenize(source[: length * 10].encode(), add_bos=False)
    if n_haystack < CELLS or len(tokens) < n_haystack + n_generated:
        raise ValueError(f"task {task}: no haystack for {length} tokens in a text of {len(tokens)}: change --length, --positions or --text")
    haystack = needle.hide(llm.detokenize(tokens[:n_haystack]).decode(errors="ignore").strip())
    result = []
    for question, stem, answer in needle.questions:
        if task == "passkey-filler":  # a small model completes it, and answers no question about it
            prompt, suffix = f"{PASSKEY_PREFACE}{haystack} {stem}", ""
        elif task == "passkey-text":
            prompt, suffix = chat_prompt(llm, f"{haystack}\n\n{question} Answer with the number only."), ""
        else:
            prompt, suffix = (haystack, f"\n\n{question} {stem}") if n_generated else (f"{haystack}\n\n{question} {stem}", "")
        after = llm.tokenize(suffix.encode(), add_bos=False) if suffix else []
        result.append((prompt_tokens(llm, prompt), tokens[n_haystack : n_haystack + n_generated], after, answer))
    return result


def answer_greedily(llm: Llama) -> str:
    tokens: list[int] = []
    while len(tokens) < ANSWER_TOKENS:
        token = int(last_logits(llm).argmax())
        if token == llm.token_eos():
            break
        tokens.append(token)
        llm.eval([token])
    return llm.detokenize(tokens).decode(errors="replace")


def ask(llm: Llama, prompt: list[int], generated: list[int], question: list[int], bar: Optional[Bar] = None) -> str:
    """The answer. What the cache still holds of the prompt is used again; what a short context cannot hold is left out."""
    excess = len(prompt) + len(generated) + len(question) + ANSWER_TOKENS - llm.n_ctx()
    prompt = prompt[max(0, excess) :]
    if not prompt:
        raise ValueError(f"{llm.n_ctx()} cells hold no prompt before {len(generated)} generated tokens: raise the pool or lower --positions")
    shared = 0
    while shared < min(llm.n_tokens, len(prompt) - 1) and llm.input_ids[shared] == prompt[shared]:
        shared += 1
    llm.n_tokens = shared  # the next eval cuts the cache back to it
    if bar is not None:
        bar.update(shared)
    feed(llm, prompt[shared:], bar)
    for token in generated:
        feed(llm, [token], bar)
    if question:
        feed(llm, question, bar)
    return answer_greedily(llm)


def run_needles(llm: Llama, side: Side, task: str, texts: dict[str, str], length: int, arguments: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """Figures of one task; the questions on one haystack share its prompt."""
    answers, found, rewalks = [], 0, 0
    for i, needle in enumerate(needles := make_needles(task, arguments.needles)):
        text = list(texts.values())[i % len(texts)]
        begin = int(len(text) * (0.2 + 0.5 * i / len(needles)))
        source = FILLER * (length // 8) if task == "passkey-filler" else text[text.find(". ", begin) + 2 :]
        clear(llm)
        for prompt, generated, question, answer in needle_prompts(llm, task, needle, source, length, arguments.positions):
            output = ask(llm, prompt, generated, question, bar)
            found += is_found(answer, output)
            answers.append([answer, output])
        stats = read_counters(llm)
        require_frozen(side, length, stats)
        rewalks += stats["rewalks_total"]
    return {"found": found, "asked": len(answers), "device_bytes": stats["device_bytes"], "rewalks": rewalks, "answers": json.dumps(answers)}


def needles(arguments: argparse.Namespace) -> int:
    texts, sides, tasks = load_texts(arguments.text), chosen_sides(arguments), arguments.task or list(NEEDLE_TASKS)
    table = Table(arguments.out or results_file("needles.csv"), NEEDLES, arguments.again)
    digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
    runs = {
        (length, side, task): run_key(side, length, arguments, task=task, texts=digest, needles=arguments.needles, positions=arguments.positions)
        for length in arguments.length for side in sides for task in tasks
    }  # fmt: skip
    description = describe(arguments)
    rows = {key: found for key, run in runs.items() if (found := table.find(run))}
    with tqdm(total=sum(key[0] * arguments.needles for key in runs if key not in rows), unit="tok", desc="needles", disable=None) as bar:
        for length in arguments.length:
            for side in sides:
                missing = [task for task in tasks if (length, side, task) not in rows]
                if not missing:
                    continue
                with contextlib.closing(open_side(side, length, arguments)) as llm:
                    for task in missing:
                        bar.set_description(f"{side.name} {length} {task}")
                        figures = run_needles(llm, side, task, texts, length, arguments, bar)
                        about = {"texts": "+".join(texts), "task": task, "length": length, "side": side.name, "type": side.type}
                        row = {**description, **about, "config": config_text(llm), **figures, "run": runs[length, side, task]}
                        rows[length, side, task] = row
                        table.add(row)
    lines = []
    for length in arguments.length:
        for side in sides:
            counts = [f"{rows[length, side, task]['found']} of {rows[length, REFERENCE, task]['found']}" for task in tasks]
            lines.append([length, side.name, int(rows[length, side, tasks[0]]["device_bytes"]) / MIB, *counts])
    print(tabulate(lines, ["length", "side", "device MiB", *tasks], floatfmt=".1f", colalign=("right", "left", "right", *["right"] * len(tasks))))
    print("found of what the full cache finds")
    print(f"rows in {table.path}")
    return 0
