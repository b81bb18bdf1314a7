"""Does llama.cpp do with an exported model what kiem does with the original?

    make export-check MODEL=trained_models/gemma3-micro-dutch-latest/final_model

runs this file twice: `expect` writes down kiem's token ids of 500 Dutch texts and what it greedily
writes after some prompts; `compare`, in an environment of its own with llama-cpp-python, loads the
GGUF file and compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

NUM_TEXTS = 500
PROMPTS = ("Nederland is een land waar", "De geschiedenis van", "Er was eens", "Het water", "In")
NEW_TOKENS = 160  # beyond the sliding window of gemma3-micro
# What tokenizers disagree about most easily.
HARD_TEXTS = (
    *(" " * number + "woord" for number in (1, 2, 3, 5, 16, 17, 31, 32, 33, 40, 62, 63, 64, 100)),
    *("a" + " " * number for number in (1, 2, 3, 5, 16, 17, 31, 32, 33, 40, 62, 63, 64, 100)),
    *("x" + "\n" * number + "y" for number in (1, 2, 3, 5, 31, 32, 40, 70)),
    *("\t" * number + "tab" for number in (1, 2, 3, 31, 33)),
    "<eos> en <bos> en <pad> en <unk> zijn hier tekst",
    "<h1>Kop</h1><p>tekst</p> <table><tr><td>cel</td></tr></table>",
    "een > </b> einde van een tag",
    "<0x41> is geen A; <unused5> en <mask> en [multimodal]",
    "▁ is geen spatie",
    "één, coöperatie, naïef, ’s-Gravenhage, IJmuiden, ĳs, ﬁets",
    "emoji 👩‍👩‍👧‍👦🇳🇱🏳️‍🌈 en 日本語, العربية, Ελληνικά, ꙮ",
    "€ 1.234,56 op 05-12-2026 om 23:59:59 uur (§ 4, lid 2°)",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa hahahahahahahahaha !!!!!!!!!!!!!!!!!!! ........",
    "def f(x):\n\treturn x  # commentaar\n\n\n    y = [1, 2]\r\n",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["expect", "compare"])
    parser.add_argument("--model", help="model directory (expect) or GGUF file (compare)")
    parser.add_argument("--expected", type=Path, help="JSON file between the two steps")
    options = parser.parse_args()
    if options.step == "expect":
        options.expected.write_text(json.dumps(expect(options.model)), encoding="utf-8")
        return 0
    return compare(options.model, json.loads(options.expected.read_text(encoding="utf-8")))


def expect(model_path: str) -> dict[str, list[dict[str, object]]]:
    """Returns kiem's ids of each text, and its greedy continuation of each prompt."""
    from kiem.inference.engine import Engine, Request
    from kiem.inference.loading import load_for_inference
    from kiem.inference.sampling import SamplingParams

    loaded = load_for_inference(model_path, "fp32")
    tokenizer = loaded.tokenizer
    texts = []
    for text in [*HARD_TEXTS, *dutch_texts()][:NUM_TEXTS]:
        ids = tokenizer.encode(text)
        texts.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids)})
    continuations = []
    greedy = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=NEW_TOKENS)
    for prompt in PROMPTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        max_tokens = len(ids) + NEW_TOKENS
        engine = Engine(loaded.model, None, max_requests=1, max_tokens=max_tokens)
        written = [output.token for _, output in engine.stream([Request(ids, greedy, seed=0)])]
        continuations.append({"prompt_ids": ids, "ids": written})
    return {"texts": texts, "continuations": continuations}


def dutch_texts() -> list[str]:
    """Returns paragraphs of the built-in sample and sentences of the minimal pairs."""
    from importlib import resources

    data = Path(str(resources.files("kiem.data.read") / "sample" / "dutch.jsonl"))
    suite = Path(str(resources.files("kiem.evaluation") / "suite" / "minimal_pairs.jsonl"))
    documents = [json.loads(line)["text"] for line in data.read_text("utf-8").splitlines()]
    pairs = [json.loads(line) for line in suite.read_text("utf-8").splitlines()]
    paragraphs = [part for text in documents for part in (text, *text.split("\n\n"))]
    return [*paragraphs[:300], *(pair["sentence_good"] for pair in pairs)]


def compare(gguf: str, expected: dict[str, list[dict[str, object]]]) -> int:
    """Prints what is different and returns the exit code."""
    import llama_cpp

    fp32 = 0  # ggml's number of the type: a cache in fp16 could turn a close choice of token
    llama = llama_cpp.Llama(gguf, n_ctx=512, type_k=fp32, type_v=fp32, verbose=False)
    wrong = 0
    for case in expected["texts"]:
        text = str(case["text"]).encode()
        ids = llama.tokenize(text, add_bos=False, special=False)
        decoded = llama.detokenize(ids).decode(errors="replace")
        if ids != case["ids"] or decoded != case["decoded"]:
            wrong += 1
            print(f"different: {case['text']!r:.80}\n  kiem      {case['ids']}\n  llama.cpp {ids}")
            print(f"  {case['decoded']!r:.60}  {decoded!r:.60}")
        assert llama.tokenize(text, add_bos=True, special=False) == [2, *ids]
    print(f"{len(expected['texts']) - wrong} of {len(expected['texts'])} texts have the same ids")
    same = total = 0
    for case in expected["continuations"]:
        found = []
        for token in llama.generate(case["prompt_ids"], temp=0.0, repeat_penalty=1.0):
            found.append(token)
            if len(found) == len(case["ids"]):
                break
        llama.reset()
        same += sum(a == b for a, b in zip(found, case["ids"], strict=True))
        total += len(found)
    print(f"{same} of {total} greedily written tokens are the same")
    return int(wrong > 0 or same < total)


if __name__ == "__main__":
    sys.exit(main())
