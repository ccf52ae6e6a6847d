//! Pre-tokenizers: how text is split into words before BPE merges inside them, by the name in a GGUF.
//!
//! Names and rules are those of `src/llama-vocab.cpp` in llama.cpp; `\p{L}` and similar classes are
//! Unicode's. A name is here only if its ids were compared with llama.cpp's, on its own vocabulary (`scripts/check/tokenizer.sh`) or on another's relabelled
//! (`scripts/check/tokenizer_random.py`).

use serde_json::{Value, json};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::normalizer::SplitDelimiterBehavior;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

/// A row of the table: the rules of a value of `tokenizer.ggml.pre`.
pub(super) struct PreTokenizer {
    names: &'static [&'static str],
    /// Each expression splits the pieces of the previous one into its matches and the text between them.
    splits: &'static [&'static str],
    /// Whether a word that is a token is not split, whatever the merges are (`ignore_merges`).
    pub ignore_merges: bool,
    /// Whether BOS is added if the file has no key for it.
    pub adds_bos: bool,
}

/// English contractions in any case.
macro_rules! contraction {
    () => {
        "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
    };
}

/// GPT-2's words.
const GPT2: &str = r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// GPT-4's words, digits in threes.
pub(super) const LLAMA3: &str = concat!(
    contraction!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// The same with single digits.
const QWEN2: &str = concat!(
    contraction!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// The same without contractions.
const UFAKZEKA: &str =
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Combining marks belong to words.
const QWEN35: &str = concat!(
    contraction!(),
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+",
    r"|\s+(?!\S)|\s+"
);

const MINICPM5: &str = concat!(
    contraction!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

const SEED_CODER: &str = concat!(
    contraction!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
);

const BAILINGMOE: &str = concat!(
    contraction!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
);

/// Words run over single spaces.
const EXAONE_MOE: &str = concat!(
    contraction!(),
    r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?",
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
);

/// Whitespace in powers of two.
const JAIS2: &str = concat!(
    contraction!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
    r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)",
    r"|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s"
);

/// Capitals and then small letters; a letter beyond ASCII counts as both, as in llama.cpp.
macro_rules! cased {
    ($upper:literal, $lower:literal, $after:expr, $number:literal) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?",
            $upper,
            "*",
            $lower,
            "+",
            $after,
            r"|[^\r\n\p{L}\p{N}]?",
            $upper,
            "+",
            $lower,
            "*",
            $after,
            "|",
            $number,
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
}

/// A contraction, or nothing.
macro_rules! ending {
    () => {
        concat!("(?:", contraction!(), ")?")
    };
}

const TEKKEN: &str = cased!(r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]", "", r"\p{N}");
const GPT_4O: &str = cased!(r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]", ending!(), r"\p{N}{1,3}");

/// Names in llama.cpp of tokenizers that split non-ASCII letters and marks differently from llama.cpp, and
/// their own rules: Mistral's Tekken, and OpenAI's `o200k_base`.
const APPROXIMATE_NAMES: &[(&str, &str)] = &[
    (
        "tekken",
        cased!(r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", "", r"\p{N}"),
    ),
    (
        "gpt-4o",
        cased!(
            r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
            ending!(),
            r"\p{N}{1,3}"
        ),
    ),
];

/// A mark before letters of ASCII is their part; other marks stand alone.
const DEEPSEEK3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+",
    r"|\s+(?!\S)|\s+"
);
const CJK: &str = r"[\u{4E00}-\u{9FA5}\u{3040}-\u{309F}\u{30A0}-\u{30FF}]+";

/// The cased letters DeepSeek lists one by one: Unicode's, but for these blocks.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[\p{Lu}\p{Ll}\p{Lt}--[\u{560}-\u{588}\u{10C7}-\u{10FF}\u{1C80}-\u{1C8F}\u{2D00}-\u{2D2D}",
    r"\u{A790}-\u{A7FF}\u{AB30}-\u{AB6F}\u{10570}-\u{105BC}\u{10D50}-\u{10D8F}\u{16E40}-\u{16EDF}",
    r"\u{1D400}-\u{1D7CB}\u{1DF00}-\u{1DFFF}]]+"
);
const DEEPSEEK_MARKS: &str =
    r"\s?[!-/:-~\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF5E}\u{2018}-\u{201F}\u{3001}\u{3002}]+";
/// As a range in llama.cpp, which takes whitespace beyond ASCII out of the text before.
const DEEPSEEK_CJK: &str = r"[\u{800}-\u{9FA5}\u{AC00}-\u{D7FF}--\s]+";

/// BLOOM's words end at marks of several scripts.
const BLOOM: &str = r" ?[^(\s|.,!?\u{2026}\u{3002}\u{FF0C}\u{3001}\u{964}\u{6D4}\u{60C})]+";

const DIGIT: &str = r"\p{N}";
const DIGITS: &str = r"\p{N}+";
const UP_TO_3_DIGITS: &str = r"\p{N}{1,3}";
const THREE_DIGITS: &str = "[0-9][0-9][0-9]";
const LINE_END: &str = r"[\r\n]";

const fn row(names: &'static [&'static str], splits: &'static [&'static str]) -> PreTokenizer {
    PreTokenizer { names, splits, ignore_merges: false, adds_bos: false }
}

const TABLE: &[PreTokenizer] = &[
    row(
        &[
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "gigachat",
            "jina-v2-es",
            "jina-v2-de",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
        ],
        &[GPT2],
    ),
    row(
        &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        &[DIGIT, GPT2],
    ),
    PreTokenizer {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        splits: &[LLAMA3],
        ignore_merges: true,
        adds_bos: true,
    },
    row(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[LLAMA3]),
    PreTokenizer {
        names: &["glm4", "glm5"],
        splits: &[LLAMA3],
        ignore_merges: true,
        adds_bos: false,
    },
    row(
        &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "stablelm2",
            "megrez",
            "hunyuan",
            "solar-open",
            "grok-2",
        ],
        &[QWEN2],
    ),
    row(&["qwen35"], &[QWEN35]),
    row(&["ufakzeka"], &[UFAKZEKA]),
    PreTokenizer {
        names: &["minicpm5"],
        splits: &[UP_TO_3_DIGITS, MINICPM5],
        ignore_merges: true,
        adds_bos: false,
    },
    row(&["seed-coder"], &[SEED_CODER]),
    row(&["bailingmoe", "bailingmoe2", "llada-moe"], &[BAILINGMOE]),
    row(&["exaone-moe"], &[EXAONE_MOE]),
    row(&["jais-2"], &[JAIS2]),
    row(&["laguna"], &[r"[^\n]+|\n+", QWEN2]),
    PreTokenizer { names: &["tekken"], splits: &[TEKKEN], ignore_merges: true, adds_bos: true },
    row(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[GPT_4O]),
    row(
        &["deepseek-llm"],
        &[LINE_END, DEEPSEEK_LETTERS, DEEPSEEK_MARKS, r"\s+$", DEEPSEEK_CJK, DIGITS],
    ),
    row(&["deepseek-coder"], &[LINE_END, r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, DIGIT]),
    row(&["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], &[UP_TO_3_DIGITS, CJK, DEEPSEEK3]),
    row(&["falcon"], &[r"[\p{P}$+<=>^~|`]+", GPT2, THREE_DIGITS]),
    row(&["bloom", "poro-chat", "gpt3-finnish"], &[BLOOM]),
    row(&["viking"], &[BLOOM, DIGIT]),
    row(&["default"], &[r"[\p{P}$+<=>^~|]+", GPT2, DIGITS, THREE_DIGITS]),
];

/// Finds a row by name.
pub(super) fn find(name: &str) -> Option<&'static PreTokenizer> {
    TABLE.iter().find(|row| row.names.contains(&name))
}

/// Texts of many scripts that distinguish any two rows that differ.
pub(super) const PROBES: &[&str] = &[
    "I'm sure they'LL say it'S 'Re 'veil don't-stop, isn't it?  We'd   better\twait.\n\n  \n End ",
    "1 22 333 4444 55555 1234567 3.14 x86 a1b2c3 7th 10,000.00 ½ ² ٣٤٥ ४५ 3२1",
    "HelloWorld XMLHttpRequest iPhone ALLCAPS mixedCASE_name snake_case kebab-case don'T",
    "!!! ... ?! (a) [b] {c} <d> =+-*/ ^~|` $5 #tag @user \\path/to//file.rs: x+=1; // end\r\n/\n",
    " leading\n trailing \n\n\n\ttabs\t\ttoo\r\n\r\n      six          eleven                 many",
    "a                                                                                  b",
    "Ünïcödé naïve ångström Straße ŁÓDŹ ǅ ʰ Ελληνικά ЖЖ жЖ Русский текст, да. عربى, कि़ हिन्दी។ ไทย",
    "中文字符 与 日本語テキスト 한국어 문장 。、，． カタカナ ㄅ 。\n“quoted” — dash… ‘x’",
    "e\u{301}te\u{301} क\u{93f} \u{301}x 🚀🌫️ 👨‍👩‍👧 ✅ €5 ±3 ×2 a\u{a0}b \u{3000}wide \u{200b}zero",
    "we'veil x'LLama y'sand z'Dome, a  12   345    6 b\t\t7\n 8\n\n  9",
    "one two  three/four\n/five !/six\n !\n\n/x a b c of the And The z",
];

/// The name of the row that splits [`PROBES`] like `theirs` and has the same `ignore_merges`; or the one of
/// [`APPROXIMATE_NAMES`] that llama.cpp uses for it.
pub(super) fn identify(theirs: &PreTokenizerWrapper, ignore_merges: bool) -> Option<&'static str> {
    let theirs = cuts(theirs)?;
    let alike = |row: &PreTokenizer| {
        row.build(|_| true).ok().and_then(|ours| cuts(&ours)).as_ref() == Some(&theirs)
    };
    let fits = |row: &&PreTokenizer| row.ignore_merges == ignore_merges && alike(row);
    let nearly = || {
        let known =
            APPROXIMATE_NAMES.iter().filter_map(|(name, split)| Some((*name, split, find(name)?)));
        let mut same = known.filter(|(_, split, row)| {
            alike(&PreTokenizer { splits: std::slice::from_ref(split), ..**row })
        });
        same.next().map(|(name, ..)| name)
    };
    TABLE.iter().find(fits).map(|row| row.names[0]).or_else(nearly)
}

/// The pieces that a pre-tokenizer splits [`PROBES`] into, with the prefix it adds to a text.
fn cuts(pre: &PreTokenizerWrapper) -> Option<Vec<Vec<String>>> {
    let of = |text: &&str| {
        let mut pieces = PreTokenizedString::from(*text);
        pre.pre_tokenize(&mut pieces).ok()?;
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Some(splits.into_iter().map(|(piece, ..)| piece.to_owned()).collect())
    };
    PROBES.iter().map(of).collect()
}

/// All names, for messages.
pub(super) fn known() -> String {
    let names: Vec<&str> = TABLE.iter().flat_map(|row| row.names).copied().collect();
    names.join(", ")
}

impl PreTokenizer {
    /// The splits, then bytes to printable characters as GPT-2 has them.
    ///
    /// A byte whose character `is_token` denies is dropped by BPE; it is cut out before, so that
    /// what stands around it is not merged, as in llama.cpp.
    pub(crate) fn build(
        &self,
        is_token: impl Fn(&str) -> bool,
    ) -> tokenizers::Result<PreTokenizerWrapper> {
        let isolate = |pattern: String| {
            let pattern = SplitPattern::Regex(pattern);
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
            tokenizers::Result::Ok(PreTokenizerWrapper::Split(split))
        };
        let mut steps = Vec::new();
        for &pattern in self.splits {
            steps.push(isolate(of_unicode_15_1(pattern))?);
        }
        steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)));
        let bytes = ByteLevel::alphabet();
        let mut missing: Vec<char> =
            bytes.into_iter().filter(|c| !is_token(c.encode_utf8(&mut [0; 4]))).collect();
        missing.sort_unstable();
        if !missing.is_empty() {
            let class: String =
                missing.iter().map(|&c| format!(r"\x{{{:X}}}", u32::from(c))).collect();
            steps.push(isolate(format!("[{class}]"))?);
        }
        Ok(PreTokenizerWrapper::Sequence(Sequence::new(steps)))
    }
}

impl PreTokenizer {
    /// The row as JSON of a `tokenizer.json`, if the regular expressions of other implementations support it.
    pub(super) fn to_json(&self) -> Option<Value> {
        let byte_level = |use_regex: bool| {
            json!({
                "type": "ByteLevel",
                "add_prefix_space": false,
                "trim_offsets": false,
                "use_regex": use_regex,
            })
        };
        if self.splits == [GPT2] {
            return Some(byte_level(true));
        }
        let split = |pattern: &&str| {
            // Set differences and \u{..} are this crate's own.
            let portable = !pattern.contains("--") && !pattern.contains(r"\u{");
            portable.then(|| {
                json!({
                    "type": "Split",
                    "pattern": { "Regex": pattern },
                    "behavior": "Isolated",
                    "invert": false,
                })
            })
        };
        let mut steps = self.splits.iter().map(split).collect::<Option<Vec<Value>>>()?;
        steps.push(byte_level(false));
        Some(json!({ "type": "Sequence", "pretokenizers": steps }))
    }
}

/// The categories of Unicode 15.1, as in llama.cpp's tables: characters added since have none.
fn of_unicode_15_1(pattern: &str) -> String {
    let categories = ["L", "Lu", "Ll", "Lt", "N", "P", "S", "M"];
    categories.iter().fold(pattern.to_owned(), |pattern, category| {
        let plain = format!(r"\p{{{category}}}");
        pattern.replace(&plain, &format!(r"[\p{{{category}}}&&\p{{Age=15.1}}]"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_build_and_names_are_unique() {
        let mut names: Vec<&str> = TABLE.iter().flat_map(|row| row.names).copied().collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        for row in TABLE {
            row.build(|_| true).unwrap();
        }
    }

    #[test]
    fn rows_are_identified_by_their_splits() {
        for row in TABLE {
            // Two rows may differ in whether BOS is added, which has its own key in a file.
            let check = |pre: &PreTokenizerWrapper| {
                let found = find(identify(pre, row.ignore_merges).unwrap()).unwrap();
                // `\s*[\r\n]` ends at the last line's end, as `\s*[\r\n]+` does.
                let same = (found.splits, found.ignore_merges) == (row.splits, row.ignore_merges)
                    || (found.names[0], row.names[0]) == ("qwen2", "bailingmoe");
                assert!(same, "{} is taken for {}", row.names[0], found.names[0]);
            };
            check(&row.build(|_| true).unwrap());
            // And by what is written of it.
            if let Some(json) = row.to_json() {
                check(&serde_json::from_value(json).unwrap());
            }
        }
        let whole = PreTokenizerWrapper::ByteLevel(ByteLevel::new(true, true, true));
        assert_eq!(identify(&whole, false), None, "a prefix space is no llama.cpp's");
    }

    /// The expressions as `tokenizer.json` of Mistral NeMo and of gpt-oss have them.
    #[test]
    fn nearly_equal_pre_tokenizers_have_llama_cpps_name() {
        let upper = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]";
        let lower = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]";
        for (name, after, digits) in
            [("tekken", "", ""), ("gpt-4o", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "{1,3}")]
        {
            let pattern = format!(
                r"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{after}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{after}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            );
            let split = json!({
                "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false
            });
            let bytes = json!({
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
            });
            let theirs = json!({ "type": "Sequence", "pretokenizers": [split, bytes] });
            let theirs = serde_json::from_value(theirs).unwrap();
            for ignore_merges in [false, true] {
                assert_eq!(identify(&theirs, ignore_merges), Some(name));
            }
            assert_ne!(
                cuts(&theirs),
                cuts(&find(name).unwrap().build(|_| true).unwrap()),
                "{name}"
            );
        }
    }

    #[test]
    fn characters_after_unicode_15_1_have_no_category() {
        let words = |text: &str| {
            let mut pieces = PreTokenizedString::from(text);
            find("gpt-2").unwrap().build(|_| true).unwrap().pre_tokenize(&mut pieces).unwrap();
            pieces.get_splits(OffsetReferential::Original, OffsetType::Byte).len()
        };
        assert_eq!(words("a\u{436}b"), 1);
        assert_eq!(words("a\u{1c8a}b"), 3, "a letter since Unicode 16");
    }
}
