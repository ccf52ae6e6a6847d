//! Special tokens in a text where they may overlap: the longest are found first, as in llama.cpp
//! (`tokenizer_st_partition` of `src/llama-vocab.cpp`), not those that begin first.
//!
//! Only where a token's end can be another's beginning do the two differ. Few vocabularies have
//! such tokens, and the others are left to the tokenizers crate, which looks for all at once.

use std::collections::HashMap;
use std::ops::Range;

/// A token that is found in a text before the text is cut into words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SpecialToken {
    /// How it is written, at least a character.
    pub text: String,
    /// Its id.
    pub id: u32,
    /// Whether it is text where special tokens are ([`super::Special::AsText`]).
    pub special: bool,
}

/// A part of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TextFragment {
    /// Bytes without any mark in them.
    Text(Range<usize>),
    /// A mark's id, and the bytes it is written in.
    Special(u32, Range<usize>),
}

/// Special tokens in the order they are looked for.
#[derive(Debug, Default)]
pub(super) struct SpecialTokens(Vec<SpecialToken>);

impl SpecialTokens {
    /// The tokens as [`super::Tokenizer::fingerprint`] hashes them. Runs keep the hash: the text must not
    /// change with names in the code.
    pub fn fingerprint_text(&self) -> String {
        let token = |SpecialToken { text, id, special }: &SpecialToken| {
            format!("Mark {{ text: {text:?}, id: {id}, special: {special} }}")
        };
        let tokens: Vec<String> = self.0.iter().map(token).collect();
        format!("Marks([{}])", tokens.join(", "))
    }

    /// From marks in the order of the vocabulary; none are kept if no two can overlap. Equally long
    /// ones stay in that order (llama.cpp leaves it to an unstable sort).
    pub fn new(mut marks: Vec<SpecialToken>) -> Self {
        if !can_overlap(&marks) {
            return Self::default();
        }
        marks.sort_by_key(|mark| std::cmp::Reverse(mark.text.len()));
        Self(marks)
    }

    /// Cuts `text` at its marks; with `as_text`, at those only that are not special.
    pub fn partition(&self, text: &str, as_text: bool) -> Vec<TextFragment> {
        let mut parts = vec![TextFragment::Text(0..text.len())];
        for mark in &self.0 {
            if !(as_text && mark.special) && text.contains(&mark.text) {
                parts = parts.into_iter().flat_map(|part| cut(text, part, mark)).collect();
            }
        }
        parts
    }
}

/// A part cut at the places where `mark` stands in it, from its start on.
fn cut(text: &str, part: TextFragment, mark: &SpecialToken) -> Vec<TextFragment> {
    let TextFragment::Text(range) = part else { return vec![part] };
    let mut parts = Vec::new();
    let mut at = range.start;
    for (place, _) in text[range.clone()].match_indices(&mark.text) {
        let start = range.start + place;
        if at < start {
            parts.push(TextFragment::Text(at..start));
        }
        at = start + mark.text.len();
        parts.push(TextFragment::Special(mark.id, start..at));
    }
    if at < range.end {
        parts.push(TextFragment::Text(at..range.end));
    }
    parts
}

/// Whether the end of a mark is the beginning of another, neither whole. Else the leftmost, and of
/// those the longest, are what is found longest first: a mark inside another never begins earlier.
fn can_overlap(marks: &[SpecialToken]) -> bool {
    /// A text before and after each of its inner places.
    fn cuts(mark: &SpecialToken) -> impl Iterator<Item = (&str, &str)> {
        mark.text.char_indices().skip(1).map(|(at, _)| mark.text.split_at(at))
    }
    // Each beginning with the id of the first mark that has it, and whether others have it too.
    let mut beginnings: HashMap<&str, (u32, bool)> = HashMap::new();
    for mark in marks {
        for (beginning, _) in cuts(mark) {
            let (first, several) = beginnings.entry(beginning).or_insert((mark.id, false));
            *several |= *first != mark.id;
        }
    }
    let meets_another = |mark: &SpecialToken| {
        let mut found = cuts(mark).filter_map(|(_, end)| beginnings.get(end));
        found.any(|&(first, several)| several || first != mark.id)
    };
    marks.iter().any(meets_another)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn marks(texts: &[&str]) -> Vec<SpecialToken> {
        let mark =
            |(id, text): (u32, &&str)| SpecialToken { text: text.to_string(), id, special: id < 2 };
        (0..).zip(texts).map(mark).collect()
    }

    /// The parts as they are written, marks in brackets.
    fn written(text: &str, parts: &[TextFragment]) -> String {
        let part = |part: &TextFragment| match part {
            TextFragment::Text(range) => text[range.clone()].to_string(),
            TextFragment::Special(id, range) => format!("[{id}:{}]", &text[range.clone()]),
        };
        parts.iter().map(part).collect()
    }

    #[test]
    fn the_longest_are_found_first() {
        #[track_caller]
        fn check(texts: &[&str], text: &str, as_text: bool, expected: &str) {
            let marks = SpecialTokens::new(marks(texts));
            assert_eq!(written(text, &marks.partition(text, as_text)), expected);
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
        let tokens = SpecialTokens::new(marks(&["<a><b", "<b>\"x"]));
        let (first, second) = (
            r#"Mark { text: "<a><b", id: 0, special: true }"#,
            r#"Mark { text: "<b>\"x", id: 1, special: true }"#,
        );
        assert_eq!(tokens.fingerprint_text(), format!("Marks([{first}, {second}])"));
        assert_eq!(SpecialTokens::default().fingerprint_text(), "Marks([])");
    }

    #[test]
    fn only_tokens_that_can_overlap_are_looked_for() {
        #[track_caller]
        fn check(texts: &[&str], expected: bool) {
            assert_eq!(can_overlap(&marks(texts)), expected, "{texts:?}");
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
        /// Where nothing is looked for, the leftmost longest are the same.
        #[test]
        fn without_overlaps_leftmost_is_longest_first(
            texts in prop::collection::btree_set("[abc]{1,4}", 1..5),
            text in "[abc]{0,30}",
        ) {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let mut marks = marks(&texts);
            prop_assume!(!can_overlap(&marks));
            let mut parts = Vec::new();
            let (mut at, mut rest) = (0, 0);
            while at < text.len() {
                let here = marks.iter().filter(|mark| text[at..].starts_with(&mark.text));
                let Some(mark) = here.max_by_key(|mark| mark.text.len()) else {
                    at += 1;
                    continue;
                };
                if rest < at {
                    parts.push(TextFragment::Text(rest..at));
                }
                rest = at + mark.text.len();
                parts.push(TextFragment::Special(mark.id, at..rest));
                at = rest;
            }
            if rest < at {
                parts.push(TextFragment::Text(rest..at));
            }
            marks.sort_by_key(|mark| std::cmp::Reverse(mark.text.len()));
            let found = SpecialTokens(marks).partition(&text, false);
            prop_assert_eq!(written(&text, &found), written(&text, &parts));
        }
    }
}
