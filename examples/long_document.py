"""Questions about a document that is longer than the pool: it is read once, then each question reads itself alone.

    python examples/long_document.py [MODEL] [DOCUMENT.txt] [-q QUESTION]... [--kv-pool 512]
"""

import argparse
import pydoc_data.topics
from pathlib import Path

from asrkf_gguf import Llama, resolve_model

QUESTIONS = ["What does the assert statement do?", "When is an assignment made to a name?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("document", nargs="?", type=Path, help="default: the beginning of Python's own language reference")
    parser.add_argument("-q", "--question", action="append", help="default: two about that reference")
    parser.add_argument("--kv-pool", type=int, default=512, help="cells on the device (default 512: far fewer than the document has tokens)")
    parser.add_argument("--max-tokens", type=int, default=48)
    arguments = parser.parse_args()

    reference = "\n\n".join(pydoc_data.topics.topics.values())[:6000]
    document = arguments.document.read_text(encoding="utf-8") if arguments.document else reference
    llm = Llama(
        str(resolve_model(arguments.model)), n_ctx=8192, n_gpu_layers=-1, verbose=False, progress=True,
        kv_policy="asrkf", kv_pool=arguments.kv_pool,
    )  # fmt: skip
    for question in arguments.question or QUESTIONS:
        messages = [{"role": "user", "content": f"{document}\n\n{question}"}]
        before = llm.kv_stats()
        answer = llm.create_chat_completion(messages=messages, max_tokens=arguments.max_tokens, temperature=0)
        after = llm.kv_stats()
        print(f"Q: {question}\nA: {answer['choices'][0]['message']['content'].strip()}")
        print(
            f"   {answer['usage']['prompt_tokens']} tokens in the prompt, {after.frozen_cells} of them frozen in RAM, "
            f"{after.restores_total['recall'] - before.restores_total['recall']} recalled for this question, all layer groups together\n"
        )
    llm.close()


if __name__ == "__main__":
    main()
