//! Matching of special tokens that may overlap in a text: the longest are matched first, as in llama.cpp
//! (`tokenizer_st_partition` of `src/llama-vocab.cpp`), not the leftmost.
//!
//! The two differ only where the end of a token can be the beginning of another. Few vocabularies have
//! such tokens; the others are left to the tokenizers crate, which matches all in one pass.

use std::collections::HashMap;
use std::ops::Range;

/// A token that is matched before pre-tokenization.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SpecialToken {
    /// Its text, not empty.
    pub text: String,
    /// Its id.
    pub id: u32,
    /// Whether it is text under [`super::Special::AsText`].
    pub special: bool,
}

/// A part of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TextFragment {
    /// A range of bytes without special tokens.
    Text(Range<usize>),
    /// The id of a special token, and its range of bytes.
    Special(u32, Range<usize>),
}

/// Special tokens in the order they are matched.
#[derive(Debug, Default)]
pub(super) struct SpecialTokens(Vec<SpecialToken>);

impl SpecialTokens {
    /// The tokens as [`super::Tokenizer::fingerprint`] hashes them. Runs keep the hash: the text must not
    /// change with names in the code.
    pub(crate) fn fingerprint_text(&self) -> String {
        let token = |SpecialToken { text, id, special }: &SpecialToken| {
            format!("Mark {{ text: {text:?}, id: {id}, special: {special} }}")
        };
        let tokens: Vec<String> = self.0.iter().map(token).collect();
        format!("Marks([{}])", tokens.join(", "))
    }

    /// From tokens in the order of the vocabulary; empty if no two can overlap. Tokens of equal length keep
    /// that order (llama.cpp sorts them unstably).
    pub(crate) fn new(mut tokens: Vec<SpecialToken>) -> Self {
        if !can_overlap(&tokens) {
            return Self::default();
        }
        tokens.sort_by_key(|token| std::cmp::Reverse(token.text.len()));
        Self(tokens)
    }

    /// Splits `text` at its special tokens; with `as_text`, only at those that are not `special`.
    pub(crate) fn partition(&self, text: &str, as_text: bool) -> Vec<TextFragment> {
        let mut parts = vec![TextFragment::Text(0..text.len())];
        for token in &self.0 {
            if !(as_text && token.special) && text.contains(&token.text) {
                parts = parts.into_iter().flat_map(|part| cut(text, part, token)).collect();
            }
        }
        parts
    }
}

/// Splits a part at the occurrences of `token` from left to right.
fn cut(text: &str, part: TextFragment, token: &SpecialToken) -> Vec<TextFragment> {
    let TextFragment::Text(range) = part else { return vec![part] };
    let mut parts = Vec::new();
    let mut at = range.start;
    for (place, _) in text[range.clone()].match_indices(&token.text) {
        let start = range.start + place;
        if at < start {
            parts.push(TextFragment::Text(at..start));
        }
        at = start + token.text.len();
        parts.push(TextFragment::Special(token.id, start..at));
    }
    if at < range.end {
        parts.push(TextFragment::Text(at..range.end));
    }
    parts
}

/// Whether a proper suffix of a token is a proper prefix of another. Else matching the leftmost, and of
/// those the longest, gives the same: a token inside another never begins earlier.
fn can_overlap(tokens: &[SpecialToken]) -> bool {
    /// The text split at each inner character boundary.
    fn cuts(token: &SpecialToken) -> impl Iterator<Item = (&str, &str)> {
        token.text.char_indices().skip(1).map(|(at, _)| token.text.split_at(at))
    }
    // Each prefix with the id of the first token that has it, and whether others have it too.
    let mut beginnings: HashMap<&str, (u32, bool)> = HashMap::new();
    for token in tokens {
        for (beginning, _) in cuts(token) {
            let (first, several) = beginnings.entry(beginning).or_insert((token.id, false));
            *several |= *first != token.id;
        }
    }
    let meets_another = |token: &SpecialToken| {
        let mut found = cuts(token).filter_map(|(_, end)| beginnings.get(end));
        found.any(|&(first, several)| several || first != token.id)
    };
    tokens.iter().any(meets_another)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens(texts: &[&str]) -> Vec<SpecialToken> {
        let token =
            |(id, text): (u32, &&str)| SpecialToken { text: text.to_string(), id, special: id < 2 };
        (0..).zip(texts).map(token).collect()
    }

    /// The text of the parts, with special tokens in brackets.
    fn written(text: &str, parts: &[TextFragment]) -> String {
        let part = |part: &TextFragment| match part {
            TextFragment::Text(range) => text[range.clone()].to_string(),
            TextFragment::Special(id, range) => format!("[{id}:{}]", &text[range.clone()]),
        };
        parts.iter().map(part).collect()
    }

    #[test]
    fn longest_special_tokens_match_first() {
        #[track_caller]
        fn check(texts: &[&str], text: &str, as_text: bool, expected: &str) {
            let tokens = SpecialTokens::new(tokens(texts));
            assert_eq!(written(text, &tokens.partition(text, as_text)), expected);
        }
        let overlapping = ["<a><b", "<b><c>", "<b>", "é<a", "cc"];
        check(&overlapping, "<a><b><c>", false, "<a>[1:<b><c>]");
        check(&overlapping, "x<a><b>", false, "x[0:<a><b]>");
        check(&overlapping, "é<a><b><b>", false, "é[0:<a><b]>[2:<b>]");
        check(&overlapping, "é<a><b><c>", false, "[3:é<a]>[1:<b><c>]");
        check(&overlapping, "<a><b><c>ccc", true, "<a>[2:<b>]<c>[4:cc]c");
        check(&overlapping, "", false, "");
        // Of equally long ones the first of the vocabulary.
        check(&["bc", "ab"], "abc", false, "a[0:bc]");
    }

    /// Runs of earlier versions hold the hash of this text.
    #[test]
    fn fingerprint_text_is_stable() {
        let tokens = SpecialTokens::new(tokens(&["<a><b", "<b>\"x"]));
        let (first, second) = (
            r#"Mark { text: "<a><b", id: 0, special: true }"#,
            r#"Mark { text: "<b>\"x", id: 1, special: true }"#,
        );
        assert_eq!(tokens.fingerprint_text(), format!("Marks([{first}, {second}])"));
        assert_eq!(SpecialTokens::default().fingerprint_text(), "Marks([])");
    }

    #[test]
    fn overlapping_tokens_are_detected() {
        #[track_caller]
        fn check(texts: &[&str], expected: bool) {
            assert_eq!(can_overlap(&tokens(texts)), expected, "{texts:?}");
        }
        check(&["<|im_start|>", "<|im_end|>", "<|im_end|><"], true);
        check(&["<|im_start|>", "<|im_end|>", "<|endoftext|>"], false);
        // One inside or in front of another, one over itself.
        check(&["abc", "b", "ab", "abcd"], false);
        check(&["aba"], false);
        check(&["aba", "ac"], true);
        check(&["日本", "本日"], true);
    }

    proptest! {
        /// Without overlaps, leftmost-longest matching gives the same.
        #[test]
        fn without_overlaps_leftmost_is_longest_first(
            texts in prop::collection::btree_set("[abc]{1,4}", 1..5),
            text in "[abc]{0,30}",
        ) {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let mut tokens = tokens(&texts);
            prop_assume!(!can_overlap(&tokens));
            let mut parts = Vec::new();
            let (mut at, mut rest) = (0, 0);
            while at < text.len() {
                let here = tokens.iter().filter(|token| text[at..].starts_with(&token.text));
                let Some(token) = here.max_by_key(|token| token.text.len()) else {
                    at += 1;
                    continue;
                };
                if rest < at {
                    parts.push(TextFragment::Text(rest..at));
                }
                rest = at + token.text.len();
                parts.push(TextFragment::Special(token.id, at..rest));
                at = rest;
            }
            if rest < at {
                parts.push(TextFragment::Text(rest..at));
            }
            tokens.sort_by_key(|token| std::cmp::Reverse(token.text.len()));
            let found = SpecialTokens(tokens).partition(&text, false);
            prop_assert_eq!(written(&text, &found), written(&text, &parts));
        }
    }
}
