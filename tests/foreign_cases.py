"""The tables of files of others: what is in them, and the message about it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

Place = tuple[str | int, ...]
REMOVED = object()
# Every type of JSON, with the extremes of numbers, and what other programs might have put there.
VALUES: list[Any] = [
    REMOVED,
    *(None, True, False),
    *(0, 1, -1, 2, 3, 7, 10**6, 10**9, 2**31, 2**63, 10**30, -(10**30)),
    *(0.0, 6.5, 1e-300, 1e300, -1e300, math.nan, math.inf, -math.inf),
    *("", "x", "7", "true", "default", "linear", "full_attention", "../x", "\u2028"),
    *([], [1], ["full_attention"], [[]], [None], {}, {"a": 1}, {"rope_type": "linear"}),
    *({"type": "yarn", "factor": 8}, {"full_attention": []}, {"rope_theta": 7}),
]

LARGE = 10**9
# What is changed in config.json: the message after the file's name.
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "rope_parameters is a list": ({"rope_parameters": []}, "rope_parameters = []: expected object"),
    "rope_parameters for all layers": (
        {"rope_parameters": {"rope_theta": 7}},
        "rope_parameters: object contains unknown field rope_theta",
    ),
    "scaled angles": (
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8}}},
        "rope_parameters.full_attention.rope_type = \"linear\": invalid enum value 'linear'",
    ),
    "scaled angles of 4.50": (
        {"rope_scaling": {"type": "yarn"}},
        "rope_scaling.type = \"yarn\": invalid enum value 'yarn'",
    ),
    "pattern of 0": (
        {"sliding_window_pattern": 0},
        "sliding_window_pattern = 0: expected int >= 1",
    ),
    "half a layer": ({"num_hidden_layers": 6.5}, "num_hidden_layers = 6.5: expected int"),
    "layers as text": ({"num_hidden_layers": "7"}, 'num_hidden_layers = "7": expected int'),
    "true layers": ({"num_hidden_layers": True}, "num_hidden_layers = true: expected int"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers = 0: expected int >= 1"),
    "a thousand million layers": (
        {"num_hidden_layers": LARGE, "layer_types": None},
        "num_hidden_layers = 1000000000: expected int <= 1000",
    ),
    "more layer_types than layers": (
        {"layer_types": ["sliding_attention"] * 8},
        "layer_types does not follow sliding_window_pattern = 2 and num_hidden_layers = 2",
    ),
    "full attention at another place": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types does not follow sliding_window_pattern = 2 and num_hidden_layers = 2",
    ),
    "unknown kind of layer": (
        {"layer_types": ["linear_attention"]},
        "layer_types[0] = \"linear_attention\": invalid enum value 'linear_attention'",
    ),
    "odd width of heads": ({"head_dim": 15}, "head_dim = 15: expected int that's a multiple of 2"),
    "heads that do not share": (
        {"num_attention_heads": 3, "num_key_value_heads": 2},
        "num_attention_heads = 3 is no multiple of num_key_value_heads = 2",
    ),
    "norms without a number": (
        {"rms_norm_eps": math.nan},
        "rms_norm_eps = NaN: expected float >= 1e-12",
    ),
    "infinite base": (
        {"rope_theta": math.inf},
        "rope_theta = Infinity: expected float <= 1000000000000.0",
    ),
    "capped logits": (
        {"final_logit_softcapping": 30.0},
        "final_logit_softcapping = 30.0 is not supported",
    ),
    "attention in both directions": (
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention = true is not supported",
    ),
    "another model": (
        {"model_type": "gemma3"},
        'not a Gemma 3 text model (model_type is "gemma3")',
    ),
}

# Not a model at all: what config.json is, or that it is not there.
NOT_MODELS: dict[str, tuple[bytes | None, str]] = {
    "nothing": (None, "cannot be read (No such file or directory)"),
    "cut": (b"{", "not JSON"),
    "empty": (b"", "empty"),
    "not UTF-8": (b'{"model_type": "caf\xe9"}', "not UTF-8"),
    "UTF-16": ('{"model_type": "gemma3_text"}'.encode("utf-16"), "not UTF-8"),
    "list": (b"[]", "expected object, got array"),
    "text": (b'"gemma3_text"', "expected object, got str"),
    "Llama": (b'{"model_type": "llama"}', 'not a Gemma 3 text model (model_type is "llama")'),
    "only its type": (b'{"model_type": "gemma3_text"}', "it lacks vocab_size"),
    "key twice": (b'{"model_type": "gemma3_text", "model_type": 1}', "stands twice"),
    "deep": (b'{"a":' * 5000, "nested too deeply"),
}

# The head of a README.md: what it says of the model, or the message after the file's name.
CARDS: dict[str, tuple[str, dict[str, Any] | str]] = {
    "no card": ("# A model\n", {}),
    "empty": ("---\n---\n", {}),
    "a run's": (
        "---\nlanguage:\n- fy\nlicense: gemma\nmodel-index:\n- name: klaver\n---\n# Klaver",
        {"name": "klaver", "languages": ["fy"], "license": "gemma"},
    ),
    "Norwegian": ("---\nlanguage: no\n---\n", {"languages": ["no"]}),
    "another licence": (
        "---\nlicense: other\nlicense_name: a\nlicense_link: LICENSE\nlanguage: [nl, fy]\n---",
        {
            "languages": ["nl", "fy"],
            "license": "other",
            "license_name": "a",
            "license_link": "LICENSE",
        },
    ),
    "values left open": ("---\nlanguage:\nlicense:\nmodel-index:\n---\n", {}),
    "CRLF and byte order mark": (
        "\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}
    ),
    "language is a mapping": ("---\nlanguage: {nl: 1}\n---\n", "language = {"),
    "licence is a list": ("---\nlicense: [mit]\n---\n", 'license = ["mit"]: expected str'),
    "index without objects": ("---\nmodel-index: [x]\n---\n", "model-index[0] = "),
    "no YAML": ("---\nlicense: [\n---\n", "cannot be read (while parsing a flow"),
    "no keys": ("---\n- nl\n---\n", "expected object, got array"),
    "deep": ("---\na: " + "[" * 3000 + "\n---\n", "cannot be read"),
}  # fmt: skip


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Yields the place of every key of a JSON value; of lists only the first and last entry."""
    if place:
        yield place
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*place, key))
    elif isinstance(value, list) and value:
        for index in sorted({0, len(value) - 1}):
            yield from places(value[index], (*place, index))


def changed(value: Any, place: Place, new: Any) -> Any:
    """Returns a JSON value with another value at a place, or without it."""
    value = copy.copy(value)
    if len(place) > 1:
        value[place[0]] = changed(value[place[0]], place[1:], new)
    elif new is REMOVED:
        del value[place[0]]
    else:
        value[place[0]] = new
    return value
