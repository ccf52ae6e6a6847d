"""Writes tests/golden/text: the outputs of Python's tokenizers and jinja2 for our files and templates.

    python scripts/golden/text.py

The tokenizers are those of tests/golden/model. The templates are our own; each exercises what real
chat templates use. They are rendered by transformers' `render_jinja_template`.
"""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

TALK = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": "What is 2 + 2?\nAnd \"3 × 3\"?"},
    {"role": "assistant", "content": "4, and it's 9.\n"},
    {"role": "user", "content": "Thanks <b>& bye</b> 🦙"},
]
CALL = [
    {"role": "user", "content": [{"type": "text", "text": "Weather in Köln?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {
                    "name": "weather",
                    "arguments": {"city": "Köln", "days": 3, "limit": 1.5, "now": True, "unit": None},
                },
            }
        ],
    },
    {"role": "tool", "name": "weather", "content": {"°C": [21, 22.0, -1e-7, 1e16, 12345678901234567890]}},
    {"role": "assistant", "content": "Sunny.", "train": False},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says the \\weather\\.\tIt's \"fine\".",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
                "required": ["city"],
                "empty": {},
                "none": [],
            },
        },
    }
]

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEMPLATES = {
    "chatml": CHATML,
    "namespace": """{%- set ns = namespace(system='', turns=0, found=false) -%}
{%- for m in messages -%}
    {%- if m.role == 'system' -%}{%- set ns.system = m.content -%}{%- set ns.found = true -%}
    {%- else -%}{%- set ns.turns = ns.turns + 1 -%}{%- endif -%}
{%- endfor -%}
{{ ns.system }}|{{ ns.turns }}|{{ ns.found }}|{{ bos_token }}|{{ undefined_thing }}|
""",
    "loops": """{% for m in messages %}
{{ loop.index0 }} {{ loop.index }} {{ loop.first }} {{ loop.last }} {{ loop.length }} {{ loop.revindex }}
  {% if not loop.first %}
    {{- loop.previtem.role }}
  {% endif %}
{% else %}
nobody
{% endfor %}
{% for i in range(1, 10, 3) %}{{ i }},{% endfor %}
{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}
{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.role }}{% endfor %}
""",
    "slices": """{{ messages[-1].role }}{{ messages[0]['role'][1:3] }}{{ messages[0].role[:-2] }}{{ messages[0].role[::-1] }}
{% for m in messages[1:] %}{{ m.role }} {% endfor %}
{% for m in messages[::-1] %}{{ m.role }} {% endfor %}
{% for m in messages[:2] | reverse %}{{ m.role }} {% endfor %}
{{ messages | length }} {{ (messages | last).role }} {{ (messages | first)['role'] }}
{{ messages[9] is defined }} {{ messages[0].nothing is defined }} {{ messages[0]['content'][0] }}
""",
    "tests": """{% for x in ['a', 1, 1.5, true, none, [1], {'a': 1}, undefined_thing] %}
{{ x is defined }} {{ x is undefined }} {{ x is none }} {{ x is string }} {{ x is mapping }} {{ x is number -}}
{{ ' ' }}{{ x is boolean }} {{ x is iterable }} {{ x is sequence }} {{ x is true }} {{ x is false }} {{ x is not none }}
{% endfor %}
{{ 'role' in messages[0] }} {{ 'x' in messages[0] }} {{ 'user' in ['user'] }} {{ 'us' in 'user' }} {{ 'x' not in 'user' }}
{{ 1 == 1.0 }} {{ 3 is odd }} {{ 4 is even }} {{ 4 is divisibleby 2 }} {{ 'a' is eq 'a' }} {{ 1 < 2 < 3 }} {{ not '' }}
""",
    "strings": """{{ '  x  '.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ ' a'.lstrip() }}|{{ 'a '.rstrip() }}|{{ 'abc'.rstrip('c') }}|
{{ 'a,b,c'.split(',') }} {{ 'a,b,c'.split(',', 1)[1] }} {{ 'a b  c'.split() }} {{ '<think>x</think>y'.split('</think>')[-1] }}
{{ 'abc'.startswith('a') }} {{ 'abc'.endswith(('c', 'd')) }} {{ 'aXbX'.replace('X', '-') }} {{ 'aXbX'.replace('X', '-', 1) }}
{{ 'hello world'.title() }} {{ 'abc'.upper() }} {{ 'ABC'.lower() }} {{ 'hello'.capitalize() }} {{ 'hello'.find('l') }} {{ 'hello'.count('l') }}
{{ 'a' ~ 1 ~ 2.5 ~ 'b' }} {{ 'ab' * 2 }} {{ 'a\\nb'.splitlines() }} {{ ', '.join(['a', 'b']) }} {{ '{} is {}'.format('a', 1) }}
{{ ' x ' | trim }}|{{ 'abc' | upper }} {{ 'x' | default('d') }} {{ nothing | default('d') }} {{ '' | default('d', true) }} {{ '7' | int + 1 }}
{{ ['b', 'a'] | join('+') }} {{ ['b', 'a'] | sort }} {{ 'abc' | replace('b', 'x') }} {{ 'a b' | title }} {{ 'abc' | length }} {{ 'ab' | list }}
{{ '12'.isdigit() }} {{ 'hello' | capitalize }} {{ 3.7 | round }} {{ 3.7 | int }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 7 / 2 }} {{ 2 ** 3 }}
""",
    "printing": """{{ true }} {{ none }} {{ 1.0 }} {{ 1e16 }} {{ 1e-5 }} {{ 0.1 + 0.2 }} {{ 100000000.0 }} {{ -0.0 }}
{{ [1, 'a', "it's", none, true, 1.5] }} {{ {'a': [1, 2], 'b': {'c': 'd'}} }} {{ ('a', 1) }} {{ 'a\\nb"' }} {{ ['a\\nb"'] }}
{{ messages[0] }} {{ messages[0] | string }} {{ true | string }} {{ 'x' + (1 | string) }}
""",
    "dicts": """{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}
{% for k, v in messages[0] | items %}{{ k }}={{ v }};{% endfor %}
{% for k in messages[0] %}{{ k }},{% endfor %}{{ messages[0].keys() | list }} {{ messages[0].values() | list }}
{{ messages[0].get('role') }} {{ messages[0].get('x', 'fallback') }} {{ messages[0].get('x') }} {{ dict(a=1, b='x') }}
{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}
{{ messages | map(attribute='role') | list }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='role') | join(',') }}
""",
    "tojson": """{{ messages | tojson }}
{{ messages | tojson(indent=4) }}
{% if tools %}{{ tools | tojson }}
{{ tools | tojson(indent=2) }}
{{ tools[0] | tojson(separators=(',', ':')) }} {{ tools[0] | tojson(sort_keys=true) }} {{ tools | tojson(ensure_ascii=true) }}
{% else %}{{ tools is none }}{% endif %}
{{ 'ü<&>\\'"/' | tojson }} {{ [] | tojson(indent=4) }} {{ {} | tojson }} {{ 1.0 | tojson }} {{ none | tojson }}
""",
    "macros": """{% macro turn(role, text='', mark=none) -%}
  <{{ role }}>{{ text }}{% if mark is not none %}{{ mark }}{% endif %}</{{ role }}>
{%- endmacro %}
{%- macro outer(m) %}{{ turn(m.role, text=m.content | string, mark='!') }}{% endmacro -%}
{% for m in messages %}
{{ outer(m) }}
{% endfor %}
{{ turn('x') }}
""",
    "whitespace": """  {% if true %}
    kept
  {%- endif %}

{#- a comment -#}
   {%+ if true %}  plus{% endif %}
	{% set x %}
captured {{ 1 + 1 }}
{% endset %}
[{{ x }}] {{- ' left' }} {{ 'right ' -}}   end
{% raw %}{{ raw }} {% generation %}{% endraw %}

""",
    "raise": """{% for m in messages %}
{% if m.role == 'system' %}
{{ raise_exception('No system message, please: ' + m.role) }}
{% endif %}
{% endfor %}
""",
    "conditional": """{{ 'a' if messages else 'b' }} {{ 'x' if false }} {% set a, b = 1, 2 %}{{ a }}{{ b }}
{%- if messages[0].role == 'system' and (messages | length > 1 or tools) %}yes{% elif tools %}tools{% else %}no{% endif %}
{% set content = messages[0].content if messages[0].content is string else messages[0].content[0].text %}{{ content }}
{% for m in messages %}{% set role = m['role'] %}{{ role }}{% endfor %}{{ role }}
{% if messages[0].content is not string and messages[0].content is iterable %}parts{% endif %}
{% if add_generation_prompt is defined and add_generation_prompt %}go{% endif %}
""",
    "calls": """{{ bos_token }}{% for m in messages %}
{%- if m.tool_calls is defined and m.tool_calls %}
{%- for c in m.tool_calls %}<call>{{ {"name": c.function.name, "arguments": c.function.arguments} | tojson }}</call>
{%- for k, v in c.function.arguments | items %}{{ k }}: {{ v if v is string else v | tojson }};{% endfor %}{% endfor %}
{%- elif m.role == 'tool' %}<tool>{{ m.content | tojson if m.content is mapping else m.content }}</tool>
{%- else %}{{ m.role }}: {{ m.content }}{% endif %}{% endfor %}{{ eos_token }}
""",
    "generation": """{% for m in messages %}
<|{{ m.role }}|>
{% if m.role == 'assistant' %}
{% generation %}
{{ m.content }}<|end|>
{%- endgeneration %}

{% else %}
{{ m.content }}<|end|>
{% endif %}
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}
""",
}
CHATS = {"talk": (TALK, None), "call": (CALL, None), "tools": (CALL, TOOLS), "talk_tools": (TALK, TOOLS), "user": (TALK[1:2], None)}


def render(template, messages, tools, prompt):
    """The text and the byte ranges of its generation blocks, or what was raised."""
    marked = "generation" in template and "{% generation" in template.replace("{% raw %}{{ raw }} {% generation %}", "")
    try:
        texts, spans = render_jinja_template(
            [messages], tools, chat_template=template, add_generation_prompt=prompt,
            return_assistant_tokens_mask=marked, **SPECIAL,
        )
    except Exception as error:
        return {"error": str(error)}
    text = texts[0]
    found = {"text": text}
    if marked:
        found["spans"] = [[len(text[:a].encode()), len(text[:b].encode())] for a, b in spans[0]]
    return found


def templates():
    cases = []
    for name, template in TEMPLATES.items():
        for chat, (messages, tools) in CHATS.items():
            for prompt in (False, True):
                found = render(template, messages, tools, prompt)
                cases.append({"template": name, "chat": chat, "add_generation_prompt": prompt, **found})
    chats = {name: {"messages": m, "tools": t} for name, (m, t) in CHATS.items()}
    return {"special": SPECIAL, "templates": TEMPLATES, "chats": chats, "cases": cases}


def texts():
    random.seed(0)
    parts = [
        "Hello", " world", "it's", "I'LL", "12345", " 3.14", "\n", "\n\n", "  ", "\t", "\r\n", "naïve", " café",
        "日本語", "한국", "привет", "🦙", "👩‍🚀", "e\u0301", "\u00a0", "\u3000", "…", "_x_", "<|im_start|>", "<|im_end|>",
        "<|im_", "<|endoftext|>", "user", "{}", "\\", "\x00", "\x7f", "Ⅷ", "½", "١٢",
    ]
    rows = ["", " ", "<|im_start|>user\nHi<|im_end|>\n"]
    rows += ["".join(random.choices(parts, k=random.randint(1, 12))) for _ in range(60)]
    return rows


def tokens():
    rows = texts()
    found = {"texts": rows}
    for name in ("llama-tiny", "qwen2-tiny"):
        tokenizer = Tokenizer.from_file(str(GOLDEN / "model" / name / "tokenizer.json"))
        parsed = tokenizer.encode_batch(rows, add_special_tokens=False)
        tokenizer.encode_special_tokens = True
        as_text = tokenizer.encode_batch(rows, add_special_tokens=False)
        found[name] = {
            "parsed": [e.ids for e in parsed],
            # Python counts characters, we count bytes.
            "offsets": [
                [[len(row[:a].encode()), len(row[:b].encode())] for a, b in e.offsets]
                for row, e in zip(rows, parsed)
            ],
            "as_text": [e.ids for e in as_text],
        }
    return found


def main():
    folder = GOLDEN / "text"
    folder.mkdir(exist_ok=True)
    for name, golden in (("templates", templates()), ("tokens", tokens())):
        with open(folder / f"{name}.json", "w", newline="\n") as file:
            json.dump(golden, file, ensure_ascii=False, indent=0 if name == "templates" else None)
            file.write("\n")


main()
