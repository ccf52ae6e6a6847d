#!/usr/bin/env python3
"""Writes tests/golden/text/real_templates.json: 50 conversations rendered by transformers with the chat
templates that people use.

    python scripts/golden/text_templates.py llama_cpp_python-0.3.36.tar.gz [--show TEMPLATE CONVERSATION]

The templates are read from two packages: TRL (Apache-2.0, `trl/chat_templates`) and llama.cpp as the sdist of
llama-cpp-python carries it (MIT, `models/templates`). The golden file holds their text, with where it comes from,
and of each rendered text a hash and its length; every seventh is there whole. --show prints one.

Conversations are rows as people write them. Two things happen to a row before transformers sees it, as in vLLM's
server: `arguments` of tool calls that are the JSON text of an object become the object, and keys of a message that
are null are left out.
"""

import hashlib
import json
import random
import sys
import tarfile
from pathlib import Path

import trl
from transformers.utils.chat_template_utils import render_jinja_template

OUT = Path(__file__).resolve().parents[2] / "tests/golden/text/real_templates.json"
SDIST = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
INSIDE = "llama_cpp_python-0.3.36/vendor/llama.cpp/models/templates"
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "smollm2": (None, "HuggingFaceTB/SmolLM2 tokenizer_config.json (Apache-2.0)"),
    "qwen2.5": ("trl", "qwen2_5"),
    "qwen3": ("trl", "qwen3"),
    "qwen3-training": ("trl", "qwen3_training"),
    "llama-3": ("trl", "llama3"),
    "llama-3.1": ("trl", "llama3_1"),
    "llama-3.2": ("trl", "llama3_2"),
    "gemma-2": ("trl", "gemma"),
    "gemma-3": ("trl", "gemma3"),
    "phi-3.5": ("trl", "phi3_5"),
    "mistral-nemo": ("llama.cpp", "mistralai-Mistral-Nemo-Instruct-2407"),
    "smollm3": ("llama.cpp", "HuggingFaceTB-SmolLM3-3B"),
    "granite-3.3": ("llama.cpp", "ibm-granite-granite-3.3-2B-Instruct"),
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
# What the templates show for the day; the tests pin it too.
TODAY = "2024-07-26"

WORDS = (
    "river stone 3.14 naïve 日本語 🦙 <b>&amp;</b> \"quoted\" it's {braces} \\n <|im_end|> [INST] </s> {% raw %} ½ "
    "print('x') Köln  two  spaces\ttab line\nbreak <think> end"
).split(" ")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Says the weather; it's \"local\" & <live>.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where, e.g. Köln"},
                    "days": {"type": "integer", "default": 1, "minimum": 0.5},
                    "unit": {"type": "string", "enum": ["°C", "°F"]},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}},
    },
]
ARGUMENTS = [
    {"city": "Köln", "days": 3},
    {"city": "A \"B\"", "unit": "°C", "nested": {"list": [1, 2.5, None, True], "empty": {}}},
    {},
    {"text": "line\nbreak <|im_end|>", "big": 12345678901234567890, "small": 1e-7},
]


def conversations():
    rng = random.Random(7)
    said = lambda: " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))
    rows = []
    for number in range(50):
        messages = []
        if number % 3 == 0:
            messages.append({"role": "system", "content": said()})
        tools = TOOLS[: 1 + number % 2] if number % 2 else None
        for turn in range(1 + number % 4):
            messages.append({"role": "user", "content": f" {said()} " if number % 5 == 0 else said()})
            if tools and turn % 2 == 0:
                calls = []
                for place in range(1 if number % 4 == 1 else 1 + number % 3):
                    arguments = rng.choice(ARGUMENTS)
                    if number % 7 == 0:
                        arguments = json.dumps(arguments, ensure_ascii=False)
                    function = {"name": rng.choice(TOOLS)["function"]["name"], "arguments": arguments}
                    calls.append({"id": f"call{number:02}{turn}{place:02}"[:9], "type": "function", "function": function})
                content = said() if number % 6 == 1 else ""
                messages.append({"role": "assistant", "content": content, "tool_calls": calls, "name": None})
                for call in calls:
                    result = json.dumps({"result": said()}) if number % 4 == 1 else said()
                    messages.append({"role": "tool", "content": result, "tool_call_id": call["id"]})
            answer = said()
            if number % 8 == 4:
                answer = f"<think>\n{said()}\n</think>\n\n{answer}"
            message = {"role": "assistant", "content": answer, "tool_calls": None}
            if number % 9 == 2:
                message["reasoning_content"] = said()
            messages.append(message)
        rows.append({"messages": messages} | ({"tools": tools} if tools else {}))
    return rows


def as_seen(messages):
    seen = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        calls = [dict(call, function=dict(call["function"])) for call in message.get("tool_calls", [])]
        for call in calls:
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        seen.append(message | ({"tool_calls": calls} if calls else {}))
    return seen


def render(template, row, variables, prompt):
    try:
        texts, _ = render_jinja_template(
            [as_seen(row["messages"])], row.get("tools"), chat_template=template, add_generation_prompt=prompt,
            **SPECIAL, **variables,
        )
    except Exception as error:
        return None, str(error)
    return texts[0], None


def main():
    import transformers.utils.chat_template_utils as utils
    from datetime import datetime

    class Pinned(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(TODAY)

    utils.datetime = Pinned
    sdist = Path(sys.argv[1])
    if (found := hashlib.sha256(sdist.read_bytes()).hexdigest()) != SDIST:
        sys.exit(f"{sdist}: sha256 is {found}, needed {SDIST}")
    sources = {}
    with tarfile.open(sdist) as archive:
        for name, (package, file) in TEMPLATES.items():
            if package == "trl":
                text = (Path(trl.__file__).parent / "chat_templates" / f"{file}.jinja").read_text()
                origin = f"trl 1.16.0, chat_templates/{file}.jinja (Apache-2.0)"
            elif package:
                text = archive.extractfile(f"{INSIDE}/{file}.jinja").read().decode()
                origin = f"llama.cpp in llama-cpp-python 0.3.36, models/templates/{file}.jinja (MIT)"
            else:
                text, origin = SMOLLM2, file
            sources[name] = {"origin": origin, "text": text}
    rows = conversations()
    if "--show" in sys.argv:
        name, number = sys.argv[-2:]
        return print(render(sources[name]["text"], rows[int(number)], {}, False))
    cases = []
    for name, source in sources.items():
        for number, row in enumerate(rows):
            variables = {}
            if name.startswith(("qwen3", "smollm3")) and number % 2:
                variables = {"enable_thinking": False}
            prompt = number % 3 == 1
            text, error = render(source["text"], row, variables, prompt)
            case = {"template": name, "row": number, "add_generation_prompt": prompt}
            if variables:
                case["variables"] = variables
            if error is not None:
                case["error"] = error
            else:
                case |= {"sha256": hashlib.sha256(text.encode()).hexdigest()[:16], "bytes": len(text.encode())}
                if len(cases) % 7 == 0:
                    case["text"] = text
            cases.append(case)
    golden = {"special": SPECIAL, "today": TODAY, "templates": sources, "rows": rows, "cases": cases}
    with open(OUT, "w", newline="\n") as file:
        json.dump(golden, file, ensure_ascii=False, indent=0)
        file.write("\n")
    from collections import Counter
    refused = Counter(case["template"] for case in cases if "error" in case)
    print(f"{len(cases)} cases, refused by the templates: {dict(refused)}")


main()
