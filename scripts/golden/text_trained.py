"""Writes tests/golden/text/trained.json: tokenizers that Python's tokenizers library learns from a small
text, and the ids they give.

    python scripts/golden/text_trained.py

The texts that are encoded are those of tests/golden/text/tokens.json.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "text"
VOCAB_SIZE = 400
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = (
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = """The tide came in over the flats, and with it came the boats, 12 of them in 1907, 340 in 1931.
"Where's the harbour master?" they'd ask, and nobody'd say; he'd gone to the other harbour, the larger one.
The larger harbour was where the larger boats were: those that came from the north, from the other side of the sea.
  let boats: Vec<Boat> = harbour.boats().filter(|boat| boat.length > 12.5).collect();
  for boat in &boats { println!("{} {}", boat.name, boat.length); }
Der Hafen war größer als die anderen Häfen, und die Schiffe waren größer als die anderen Schiffe.
Море было холодное, и море было тёмное. 海は広い、海は深い。 🚢🚢 100000 200000 100000
WHERE'S THE HARBOUR? THE HARBOUR'S THERE. We'll go there, we'll see, we've seen it; I'm sure, you're sure.
"""


def pre_tokenizer(cut):
    byte_level = lambda use_regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    if cut == "gpt-2":
        return byte_level(True)
    if cut == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)])
    split = pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, byte_level(False)])


def trained(cut, texts):
    tokenizer = Tokenizer(models.BPE(ignore_merges=cut == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizer(cut)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    ids = lambda: [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    found = {"tokenizer": json.loads(tokenizer.to_str()), "parsed": ids()}
    tokenizer.encode_special_tokens = True
    return found | {"as_text": ids()}


texts = json.loads((GOLDEN / "tokens.json").read_text())["texts"]
cuts = {cut: trained(cut, texts) for cut in ["gpt-2", "smollm", "llama-bpe"]}
golden = {"text": TEXT, "vocab_size": VOCAB_SIZE, "cuts": cuts}
(GOLDEN / "trained.json").write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n")
