"""An agent that calls tools in a loop. Its instructions are pinned: however long the loop runs, they are never frozen.

    python examples/agent.py [MODEL] [--task TEXT] [--steps 8] [--kv-pool 512]
"""

import argparse
import json
from pathlib import Path

from asrkf_gguf import Llama, resolve_model

INSTRUCTIONS = """You look through files. Answer with one JSON object: {"tool": NAME, "argument": TEXT}.
Tools: "list" names the files, with their beginnings; "read" gives the beginning of a file; "done" ends with a summary."""
FORM = {
    "type": "object",
    "properties": {"tool": {"enum": ["list", "read", "done"]}, "argument": {"type": "string", "maxLength": 60}},
    "required": ["tool", "argument"],
}


def use(tool: str, argument: str, folder: Path) -> str:
    """What a tool says. It sees the folder alone."""
    target = (folder / argument).resolve()
    if not target.is_relative_to(folder.resolve()):
        return "outside of the folder"
    if tool == "list":
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[:80]}" for path in files) or "nothing"
    return target.read_text(errors="replace")[:600] if target.is_file() else f"there is no file {argument}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--task", default="Find out what the examples in this folder show.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kv-pool", type=int, default=512, help="cells on the device")
    arguments = parser.parse_args()

    llm = Llama(
        str(resolve_model(arguments.model)), n_ctx=8192, n_gpu_layers=-1, verbose=False,
        kv_policy="asrkf,layers=shared",  # one pool: what is pinned has to fit into the smallest
        kv_pool=arguments.kv_pool,
    )  # fmt: skip
    messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": arguments.task}]
    form = {"type": "json_object", "schema": FORM}
    for step in range(arguments.steps):
        answer = llm.create_chat_completion(messages=messages, response_format=form, max_tokens=96, temperature=0.7, seed=step)
        if step == 0:
            llm.pin(*llm.chat_span(messages))  # the first message, now that it is in the cache
        messages.append(answer["choices"][0]["message"])
        try:
            call = json.loads(messages[-1]["content"])
        except json.JSONDecodeError:  # cut off by max_tokens
            call = {"tool": "list", "argument": ""}
        result = "" if call["tool"] == "done" else use(call["tool"], call["argument"], arguments.folder)
        print(f"step {step + 1}: {call['tool']}({call['argument']!r}) -> {result[:60]!r}")
        if call["tool"] == "done":
            break
        messages.append({"role": "user", "content": result})
    stats = llm.kv_stats()
    (begin, end), *_ = llm.pinned()
    is_active = all(state != "frozen" for position, state in llm.kv_tokens() if begin <= position < end)
    print(f"{stats.tokens} tokens, {stats.frozen_cells} frozen")
    print(f"positions {begin} to {end - 1}, the instructions: {'all active' if is_active else 'frozen'}")
    llm.close()


if __name__ == "__main__":
    main()
