"""OpenAI's client against `asrkf serve`, and the cache's figures behind each answer. Needs pip install openai.

    asrkf serve smollm2 -c 8192 --kv-pool 512 --port 8000
    python examples/openai_client.py [--address http://127.0.0.1:8000]
"""

import argparse
import json
import urllib.request

import openai


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    parser.add_argument("--max-tokens", type=int, default=48)
    arguments = parser.parse_args()

    client = openai.OpenAI(base_url=f"{arguments.address}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": "Say in one sentence what a lighthouse is for."}]
    for piece in client.chat.completions.create(model=model, messages=messages, max_tokens=arguments.max_tokens, temperature=0, stream=True):
        print(piece.choices[0].delta.content or "", end="", flush=True)
    print()
    with urllib.request.urlopen(f"{arguments.address}/v1/kv_stats") as answer:
        kv = json.load(answer)["kv"]
    print(f"{model}: policy {kv['policy']}, {kv['tokens']} tokens, pool {kv['pool_cells']} cells, {kv['frozen_cells']} frozen")


if __name__ == "__main__":
    main()
