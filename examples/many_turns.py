"""A chat of many turns whose cache never grows: what was said long ago is frozen, and comes back when a question asks for it.

    python examples/many_turns.py [MODEL] [--turns 12] [--kv-pool 512]
"""

import argparse

from asrkf_gguf import Llama, resolve_model

SUBJECTS = ["the sea", "the moon", "bread", "bicycles", "rain", "bees", "glass", "maps", "salt", "clocks", "rivers", "paper"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--kv-pool", type=int, default=512, help="cells on the device")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    arguments = parser.parse_args()

    llm = Llama(
        str(resolve_model(arguments.model)), n_ctx=8192, n_gpu_layers=-1, verbose=False, kv_policy="asrkf", kv_pool=arguments.kv_pool
    )
    messages = [{"role": "system", "content": "You are a teacher. The pupil's name is Ada."}]
    for turn in range(arguments.turns):
        question = f"Tell me something about {SUBJECTS[turn % len(SUBJECTS)]}."
        messages.append({"role": "user", "content": question})
        answer = llm.create_chat_completion(messages=messages, max_tokens=arguments.max_tokens, temperature=0)
        messages.append(answer["choices"][0]["message"])
        stats = llm.kv_stats()
        print(
            f"turn {turn + 1}: {stats.tokens} tokens so far, {stats.active_cells} active, {stats.frozen_cells} frozen; "
            f"{stats.device_kv_bytes >> 20} MiB of K and V on the device, {stats.host_kv_bytes >> 20} MiB in RAM"
        )
    llm.close()


if __name__ == "__main__":
    main()
