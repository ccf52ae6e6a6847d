//! Stop strings in streamed text.

/// Passes text on until one of the stop strings is complete; the stop string itself is not passed on. The
/// result does not depend on how the text is cut into pieces.
#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<String>,
    /// The end of the text so far, which may be the beginning of a stop string and is held back.
    held: String,
    stopped: bool,
}

impl StopStrings {
    /// A filter for `stops`. Empty strings are ignored.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        Self { stops, held: String::new(), stopped: false }
    }

    /// Takes the next piece, and returns the text that cannot be part of a stop string. Once a stop string is
    /// complete, later pieces are ignored.
    pub fn push(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(piece);
        if let Some(start) = self.first_match() {
            self.held.truncate(start);
            self.stopped = true;
            return std::mem::take(&mut self.held);
        }
        let certain = self.held.len() - self.beginning_of_a_stop();
        let held = self.held.split_off(certain);
        std::mem::replace(&mut self.held, held)
    }

    /// Whether a stop string is complete.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// The text that is still held back, to be called at the end of the text.
    pub fn finish(self) -> String {
        self.held
    }

    /// Start of the match that ends first; of several such matches, of the longest.
    fn first_match(&self) -> Option<usize> {
        let matches = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        matches.min().map(|(_, start)| start)
    }

    /// Length of the longest suffix of `held` that is a prefix of a stop string.
    fn beginning_of_a_stop(&self) -> usize {
        let ends = self.held.char_indices().map(|(start, _)| &self.held[start..]);
        let mut begins = ends.filter(|end| self.stops.iter().any(|stop| stop.starts_with(end)));
        begins.next().map_or(0, str::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The text passed on, and whether a stop string ended it.
    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|stop| stop.to_string()).collect();
        let mut filter = StopStrings::new(&stops);
        let mut text: String = pieces.iter().map(|piece| filter.push(piece)).collect();
        let stopped = filter.stopped();
        text.push_str(&filter.finish());
        (text, stopped)
    }

    #[test]
    fn text_is_cut_at_the_first_match() {
        let check = |stops: &[&str], pieces: &[&str], text: &str, stopped| {
            assert_eq!(run(stops, pieces), (text.to_string(), stopped), "{stops:?} {pieces:?}");
        };
        check(&[], &["a", "b"], "ab", false);
        check(&[""], &["a", "b"], "ab", false);
        check(&["\n\n"], &["one\n", "\ntwo", "three"], "one", true);
        check(&["\n\n"], &["one\n", "two\n"], "one\ntwo\n", false);
        check(&["User:", "\n"], &["Hi Us", "er", " Use", "r: no"], "Hi User ", true);
        check(&["aab"], &["a", "a", "a", "b", "x"], "a", true);
        check(&["abcd", "bc"], &["abcd"], "a", true);
        check(&["bc", "abc"], &["xabcd"], "x", true);
        check(&["é!"], &["caf\u{e9}", "\u{e9}", "!"], "café", true);
    }

    #[test]
    fn only_a_prefix_of_a_stop_string_is_held_back() {
        let mut filter = StopStrings::new(&["<end>".to_string()]);
        assert_eq!(filter.push("one <e"), "one ");
        assert_eq!(filter.push("gg> <"), "<egg> ");
        assert_eq!(filter.push("end> two"), "");
        assert!(filter.stopped());
        assert_eq!(filter.push("three"), "");
        assert_eq!(filter.finish(), "");
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            text in "[abé]{0,24}",
            stops in proptest::collection::vec("[abé]{1,4}", 0..3),
            cuts in proptest::collection::vec(0usize..24, 0..6),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|&c| text.is_char_boundary(c)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let whole = run(&stops, &[&text]);
            prop_assert_eq!(&run(&stops, &pieces), &whole);
            prop_assert_eq!(whole.1, stops.iter().any(|stop| text.contains(stop)));
            prop_assert!(text.starts_with(&whole.0));
            prop_assert!(stops.iter().all(|stop| !whole.0.contains(stop)));
        }
    }
}
