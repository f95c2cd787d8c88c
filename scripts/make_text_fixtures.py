"""Writes tests/fixtures/text/*.json: token ids of varied strings by other people's tokenizers.

    pip install llama-cpp-python gguf tokenizers sentencepiece transformers
    python scripts/make_text_fixtures.py SmolLM2-135M-Instruct.Q4_1.gguf gemma-3-270m-q4_k_m.gguf

- `smollm2.json`, `gemma3.json`: {"rows": [[text, ids], ...]}, by llama.cpp from the real files.
  SmolLM2's ids are first checked against a `tokenizers` pipeline written out here.
- `cuts.json`: {"tokens", "merges", "rows": [text, ...], "groups": [{"names", "ids"}, ...]}, by
  llama.cpp: a byte-level vocabulary whose merges run across every boundary, so that each cut shows,
  under every `tokenizer.ggml.pre` that we accept. Names with equal ids share a group; null where
  llama.cpp simplifies the cut.
- `tiny.model`, `tiny.json`: a sentencepiece vocabulary that puts a space before the text; ids of
  "rows" by the library ("library") and, from GGUF files, by llama.cpp: "gguf", and "phi3" for a
  file that calls itself Phi-3, whose special tokens swallow the white space after them.
- `chat.json`: {"cases": [{"template", "messages", "tools", "variables", "text"}, ...]}, by
  transformers.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import unicodedata
from pathlib import Path

import gguf
import sentencepiece
from llama_cpp import Llama
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.utils.chat_template_utils import render_jinja_template

OUT = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "text"
# Where llama.cpp simplifies a cut, its ids are not the model's: such rows are left out (null).
# These words end at a change of case, which it sees in ASCII only, and lack combining marks there;
# in the other list it takes any white space for an ASCII one.
ASCII_CASE = ("tekken", "gpt-4o", "llama4")
ASCII_SPACE_ONLY = ("deepseek-coder",)
CUTS = (
    "default llama3 llama-v3 llama-bpe falcon3 midm-2.0 dbrx smaug-bpe qwen2 deepseek-r1-qwen "
    "megrez seed-coder gpt-2 phi-2 olmo trillion gigachat a.x-4.0 smollm starcoder refact "
    "command-r codeshell exaone minerva-7b tekken gpt-4o llama4 deepseek-coder deepseek-v3"
).split()
WRITTEN = [
    "Hello world",
    " Hello world",
    "Hello  world ",
    "  12",
    "12",
    "1234567890",
    "In 2026, 3.14159 * 2 = 6.28318; 1,000,000 users",
    "x1y22z333 ٣٤٥ १२३ Ⅷ ½ ²",
    "I'm you're they've it's we'll he'd don't I'LL WE'RE",
    "camelCase PascalCase HTTPServer snake_case kebab-case SCREAMING_CASE",
    "def f(x):\n    return x ** 2\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; } // done\r\n\r\n",
    '{"key": [1, 2.5, null, true], "s": "a\\nb"}',
    "SELECT * FROM t WHERE a >= 10 AND b != 'x';",
    "https://example.com/path?q=1&r=%20#frag",
    "user@example.org, +1 (555) 010-9999",
    '<div class="a"><p>text</p></div>',
    "你好，世界！今天天气很好。",
    "日本語のテキストとカタカナ、ひらがな。",
    "한국어 문장입니다. 안녕하세요?",
    "Привет, как дела? Ёлка",
    "Γειά σου Κόσμε",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "Tiếng Việt có dấu",
    "Zażółć gęślą jaźń",
    "naïve café résumé Übergröße straße",
    "👩‍👩‍👧‍👦 🎉🎉 🇩🇪 👍🏽 ❤️",
    "emoji😀in😀words😀",
    "∑ ∫ √2 ≈ 1.414 ≠ π; ∀x∈ℝ",
    "a\u00a0b\u2003c\u200bd\u3000e",
    "tabs\tand\t\ttabs",
    "\n",
    "\n\n",
    "\n\n\n\n text",
    "   \n   \n",
    " ",
    "          ",
    "trailing   ",
    "a\r\nb\rc",
    "...!!! ??? --- === *** ~~~ ___",
    "$100 €50 ¥30 £20 `code` ^ | \\",
    "“quotes” ‘single’ «guillemets» — dash – en",
    "@user #hashtag 50% off & more",
    "A",
    "é",
    "\x00\x01\x7f",
    "\ufeffBOM",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "lorem ipsum dolor sit amet, consectetur adipiscing elit " * 4,
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>",
    "text<|endoftext|>text",
    "<|im_end|><|im_end|>",
    "<|im_start|> <|im_end|>",
    "<start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n",
    "<bos>Hello<eos>",
    "<unused7> <pad> <unk> <mask>",
    "<0x41> <0x0A>",
    "[multimodal] <start_of_image>",
    "<repo_name>a/b<filename>c.py",
    "almost <|im_start and <start_of",
    "\u2581already\u2581escaped",
    "ⵣⴰⵣⴰ 𐍈 𓀀 🀄",
]
CHAT_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {% if message.role == "tool" %}{% continue %}{% endif %}
    {% if loop.index0 > 3 %}{% break %}{% endif %}
    {% generation %}
[{{ message["role"] }}] {{ message.content | trim }}
    {% endgeneration %}
    {% for call in message.tool_calls or [] %}
call {{ call.function.name }}({{ call.function.arguments | tojson(indent=2) }})
    {% endfor %}
{% endfor %}
{% if tools %}
tools: {{ tools | tojson }}
{% endif %}
{% set space = namespace(found=false) %}
{% for key in dict(a=1, b=2) %}{% set space.found = key %}{% endfor %}
{{ space.found }} {{ enable_thinking is defined and enable_thinking }} {{ strftime_now("%%") }}
{% if add_generation_prompt %}[assistant]{% endif %}

"""
CHATS = [
    [{"role": "user", "content": "  Hello <b>&\u00e9\u4f60</b> "}],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3+3?\n"},
        {"role": "user", "content": "dropped by the template"},
    ],
    [
        {"role": "user", "content": "Weather in Z\u00fcrich?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Z\u00fcrich"}}}],
        },
        {"role": "tool", "content": "21 \u00b0C"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "It's <hot>"}}]
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz     ",
    "ABCabc XYZxyz'stdl ",
    "0123456789 .,-+",
    " \n\t\r ab1",
    "的一是在不了有和人这中大为上个国 ，。",
    "あいうカキク漢字 1a",
    "😀🎉👍🏽❤\ufe0f\u200d a",
    "éèüñøåßçĀžķ ",
    "(){}[]<>=+-*/;:'\"\\ \nifor",
    "абвгдежз АБВ ",
    "ابتثجح ١٢٣",
    "กขคงจฉ ",
]


def texts() -> list[str]:
    """The written strings and, always the same, drawn ones: 228 in all."""
    draw = random.Random(20261124)
    drawn = [
        "".join(draw.choices(alphabet, k=draw.randint(1, 40)))
        for alphabet in ALPHABETS
        for _ in range(11)
    ]
    everything = "".join(ALPHABETS)
    drawn += ["".join(draw.choices(everything, k=draw.randint(5, 50))) for _ in range(29)]
    return WRITTEN + drawn


def ids_by_llama_cpp(path: Path | str, rows: list[str]) -> list[list[int]]:
    model = Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) for text in rows]


def smollm2_pipeline(reader: gguf.GGUFReader) -> Tokenizer:
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.add_special_tokens([t for t, k in zip(tokens, kinds, strict=True) if k == 3])
    return tokenizer


def write_vocabulary(path: Path, *, arch: str, model: str, pre: str, arrays: dict) -> None:
    """A GGUF without tensors: `arrays` are the `tokenizer.ggml.*` lists."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("phi-3 tiny" if arch == "phi3" else "tiny")
    for name, values in arrays.items():
        writer.add_array(f"tokenizer.ggml.{name}", values)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def boundless_vocabulary(rows: list[str]) -> dict:
    """Byte-level BPE learnt without any cut: its merges join words, digits and line ends alike."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*rows, *rows], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokens": tokens,
        "token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "merges": [" ".join(pair) for pair in model["merges"]],
    }


def simplified(pre: str, text: str) -> bool:
    if pre in ASCII_CASE:
        cased = ("M", "Lu", "Ll", "Lt")
        return any(not c.isascii() and unicodedata.category(c).startswith(cased) for c in text)
    return pre in ASCII_SPACE_ONLY and any(c.isspace() and not c.isascii() for c in text)


def cut_groups(folder: Path, rows: list[str]) -> dict:
    arrays = boundless_vocabulary(rows)
    groups: list[dict] = []
    for pre in CUTS:
        path = folder / f"{pre}.gguf"
        write_vocabulary(path, arch="llama", model="gpt2", pre=pre, arrays=arrays)
        found = zip(rows, ids_by_llama_cpp(path, rows), strict=True)
        ids = [None if simplified(pre, text) else row for text, row in found]
        same = next((group for group in groups if group["ids"] == ids), None)
        if same is None:
            same = {"names": [], "ids": ids}
            groups.append(same)
        same["names"].append(pre)
    return arrays | {"rows": rows, "groups": groups}


def train_tiny_model(folder: Path) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WRITTEN * 3),
        model_prefix=str(folder / "tiny"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|user|>", "<|end|>", "<|endoftext|>"],
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tiny.model"


def tiny_rows(folder: Path, rows: list[str]) -> dict:
    path = train_tiny_model(folder)
    (OUT / "tiny.model").write_bytes(path.read_bytes())
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    size = range(model.get_piece_size())
    kinds = ((model.is_unknown, 2), (model.is_control, 3), (model.is_byte, 6))
    arrays = {
        "tokens": [model.id_to_piece(i) for i in size],
        "scores": [float(model.get_score(i)) for i in size],
        "token_type": [next((kind for test, kind in kinds if test(i)), 1) for i in size],
    }
    for text in ("<|user|>", "<|end|>", "<|endoftext|>"):
        arrays["token_type"][arrays["tokens"].index(text)] = 4
    rows = [*rows, "<s>a</s> b", "<|user|>\nHi <|end|>\n<|user|> there", " <unk> x"]
    found = {"rows": rows, "library": model.encode(rows), "metadata": arrays}
    for arch, name in (("llama", "gguf"), ("phi3", "phi3")):
        path = folder / f"{name}.gguf"
        write_vocabulary(path, arch=arch, model="llama", pre="default", arrays=arrays)
        found[name] = ids_by_llama_cpp(path, rows)
    return found


def chat_cases(template: str) -> list[dict]:
    cases = []
    for source in (template, CHAT_TEMPLATE):
        for messages in CHATS:
            for tools in (None, TOOLS):
                variables = {"bos_token": "<s>", "add_generation_prompt": tools is None}
                variables |= {"enable_thinking": True} if tools else {}
                texts, _ = render_jinja_template(
                    [messages], tools=tools, chat_template=source, **variables
                )
                case = {"template": source, "messages": messages, "tools": tools}
                cases.append(case | {"variables": variables, "text": texts[0]})
    return cases


def write(name: str, content: dict) -> None:
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    (OUT / name).write_text(text.replace("],[", "],\n[") + "\n")


def main(smollm2: str, gemma3: str) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    rows = texts()
    reader = gguf.GGUFReader(smollm2)
    found = ids_by_llama_cpp(smollm2, rows)
    pipeline = smollm2_pipeline(reader)
    differing = [t for t, ids in zip(rows, found, strict=True) if pipeline.encode(t).ids != ids]
    if differing:
        raise SystemExit(f"llama.cpp and tokenizers differ on {differing}")
    write("smollm2.json", {"rows": list(zip(rows, found, strict=True))})
    write("gemma3.json", {"rows": list(zip(rows, ids_by_llama_cpp(gemma3, rows), strict=True))})
    template = reader.fields["tokenizer.chat_template"].contents()
    write("chat.json", {"cases": chat_cases(template)})
    with tempfile.TemporaryDirectory() as folder:
        write("cuts.json", cut_groups(Path(folder), rows))
        write("tiny.json", tiny_rows(Path(folder), rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
