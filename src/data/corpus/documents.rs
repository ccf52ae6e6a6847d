//! Documents of text, JSONL and Parquet files, in pieces of bounded size.
//!
//! Files are streamed: in memory are only a chunk of a few megabytes, one line of JSONL (64 MB at most) and
//! one page of a Parquet column.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use ::parquet::column::reader::ColumnReader;
use ::parquet::file::reader::FileReader;

use super::CorpusError;
use crate::data::parquet::{self, guarded};
use crate::data::{DataError, Message, Row, example, lines, rows};
use crate::text::Tokenizer;

/// The line that separates the documents of a text file.
const BORDER: &[u8] = b"<|endoftext|>";
/// The key or column that holds the text.
const TEXT: &str = "text";
/// Target size of a piece in bytes; a piece has at most twice as many.
const PIECE: usize = 128 << 10;
/// Number of bytes of pieces that are processed at a time.
const CHUNK: usize = 8 << 20;
/// Number of values of a Parquet column that are read at a time.
const ROWS_AT_A_TIME: usize = 64;

/// A document, or a part of one that is too long to be tokenized at once.
#[derive(Debug, Clone, PartialEq)]
pub struct DocumentPiece {
    /// The text; for a conversation the contents of its messages, one per line.
    pub text: String,
    /// The conversation to render with the chat template, if it is one.
    pub chat: Option<Conversation>,
    /// Whether the piece is the first of its document.
    pub first: bool,
    /// Whether the piece is the last of its document.
    pub last: bool,
}

/// A document that is a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// The messages.
    pub(super) row: Row,
    /// The file it comes from.
    path: PathBuf,
    /// The line number, counted from 1.
    line: u64,
}

impl Conversation {
    /// Tokens of the conversation as rendered by the chat template, without BOS, which every document gets.
    pub(super) fn tokens(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, DataError> {
        let tokenized =
            example::tokenize(&self.row, tokenizer, None).map_err(|fault| DataError::Rows {
                path: self.path.clone(),
                first: vec![(self.line, fault.to_string())],
                wrong: 1,
                rows: self.line,
            })?;
        let mut tokens = tokenized.tokens;
        if tokens.first().is_some_and(|&first| tokenizer.bos() == Some(first)) {
            tokens.remove(0);
        }
        Ok(tokens)
    }
}

impl AsRef<str> for DocumentPiece {
    fn as_ref(&self) -> &str {
        &self.text
    }
}

/// Passes all documents of `files` to `take`, in order, a chunk of pieces at a time. How documents are cut
/// depends only on the files. Documents of only white space are skipped.
///
/// # Errors
/// If a file cannot be read, after the pieces before it were passed on; errors of `take`;
/// [`DataError::Stopped`] once `stop` is set.
pub fn read_documents(
    files: &[PathBuf],
    stop: &AtomicBool,
    take: &mut dyn FnMut(&[DocumentPiece]) -> Result<(), CorpusError>,
) -> Result<(), CorpusError> {
    let mut chunks = Chunks { pieces: Vec::new(), bytes: 0, stop, take };
    for path in files {
        if has_lines(path) {
            jsonl(path, &mut chunks)?;
        } else if extension(path) == Some("parquet") {
            column(path, &mut chunks)?;
        } else {
            text(path, &mut chunks)?;
        }
    }
    chunks.flush()
}

/// Whether a file is read as JSONL, which may contain conversations.
pub(super) fn has_lines(path: &Path) -> bool {
    matches!(extension(path), Some("jsonl" | "ndjson"))
}

fn extension(path: &Path) -> Option<&str> {
    path.extension().and_then(|extension| extension.to_str())
}

struct Chunks<'a> {
    pieces: Vec<DocumentPiece>,
    bytes: usize,
    stop: &'a AtomicBool,
    take: &'a mut dyn FnMut(&[DocumentPiece]) -> Result<(), CorpusError>,
}

impl Chunks<'_> {
    /// Adds a whole document.
    fn document(&mut self, text: &str) -> Result<(), CorpusError> {
        let (mut rest, mut first) = (text, true);
        while rest.len() > 2 * PIECE {
            let (piece, after) = rest.split_at(word_border(rest));
            self.piece(piece.into(), first, false)?;
            (rest, first) = (after, false);
        }
        self.piece(rest.into(), first, true)
    }

    fn piece(&mut self, text: String, first: bool, last: bool) -> Result<(), CorpusError> {
        if first && last && text.trim().is_empty() {
            return Ok(());
        }
        self.bytes += text.len();
        self.pieces.push(DocumentPiece { text, chat: None, first, last });
        if self.bytes < CHUNK { Ok(()) } else { self.flush() }
    }

    fn chat(&mut self, messages: &[Message], chat: Conversation) -> Result<(), CorpusError> {
        let content = |message: &Message| message.value["content"].as_str().map(String::from);
        let texts: Vec<String> = messages.iter().filter_map(content).collect();
        let text = texts.join("\n");
        self.bytes += text.len();
        self.pieces.push(DocumentPiece { text, chat: Some(chat), first: true, last: true });
        if self.bytes < CHUNK { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<(), CorpusError> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(DataError::Stopped.into());
        }
        if !self.pieces.is_empty() {
            (self.take)(&self.pieces)?;
        }
        (self.pieces, self.bytes) = (Vec::new(), 0);
        Ok(())
    }
}

/// Reads a text file: one document, or several separated by border lines.
fn text(path: &Path, chunks: &mut Chunks<'_>) -> Result<(), CorpusError> {
    let io = |source| DataError::Io { path: path.into(), source };
    let mut reader = BufReader::with_capacity(1 << 20, File::open(path).map_err(io)?);
    let mut document = TextDocument { path, bytes: Vec::new(), offset: 0, first: true };
    let mut at_line_start = true;
    let mut line = Vec::new();
    loop {
        line.clear();
        // A line may have any length, so it is read in bounded parts.
        let read = reader.by_ref().take(PIECE as u64).read_until(b'\n', &mut line).map_err(io)?;
        if read == 0 {
            break;
        }
        if at_line_start && without_line_end(&line) == BORDER {
            // The newline before the border belongs to the border.
            let text = without_line_end(&document.bytes).len();
            let line_end = document.bytes.split_off(text);
            document.end(chunks)?;
            document.offset += (line_end.len() + read) as u64;
        } else {
            document.bytes.extend_from_slice(&line);
            document.pass_on(chunks)?;
        }
        at_line_start = line.ends_with(b"\n");
    }
    document.end(chunks)
}

/// The document that is being read; `bytes` is the part of it that is not yet passed on.
struct TextDocument<'a> {
    path: &'a Path,
    bytes: Vec<u8>,
    /// Offset of `bytes` in the file.
    offset: u64,
    first: bool,
}

impl TextDocument<'_> {
    /// Passes on pieces of the document once it is longer than two pieces.
    fn pass_on(&mut self, chunks: &mut Chunks<'_>) -> Result<(), CorpusError> {
        while self.bytes.len() > 2 * PIECE {
            // The last character may be incomplete; it stays in `bytes` until the rest is read.
            let text = match std::str::from_utf8(&self.bytes) {
                Ok(text) => text,
                Err(error) if error.error_len().is_none() => {
                    let valid = &self.bytes[..error.valid_up_to()];
                    std::str::from_utf8(valid).map_err(|error| self.not_utf8(error))?
                }
                Err(error) => return Err(self.not_utf8(error)),
            };
            let piece = text[..word_border(text)].to_owned();
            let length = piece.len();
            self.pass(chunks, piece, false)?;
            self.bytes.drain(..length);
            self.offset += length as u64;
        }
        Ok(())
    }

    fn end(&mut self, chunks: &mut Chunks<'_>) -> Result<(), CorpusError> {
        let length = self.bytes.len();
        let text = String::from_utf8(std::mem::take(&mut self.bytes)).map_err(|error| {
            let error = error.utf8_error();
            self.not_utf8(error)
        })?;
        self.pass(chunks, text, true)?;
        self.offset += length as u64;
        Ok(())
    }

    fn pass(
        &mut self,
        chunks: &mut Chunks<'_>,
        mut text: String,
        last: bool,
    ) -> Result<(), CorpusError> {
        if self.offset == 0 && text.starts_with('\u{feff}') {
            text.remove(0); // a byte order mark
        }
        chunks.piece(text, self.first, last)?;
        self.first = last;
        Ok(())
    }

    fn not_utf8(&self, error: std::str::Utf8Error) -> CorpusError {
        let offset = self.offset + error.valid_up_to() as u64;
        CorpusError::NotUtf8 { path: self.path.into(), offset }
    }
}

fn without_line_end(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    line.strip_suffix(b"\r").unwrap_or(line)
}

/// Where to cut a text that is longer than a piece: before a single space between two letters, where every
/// pre-tokenizer splits too, so that the tokens are those of the whole text. If the second half of a piece
/// has no such position, the text is cut between any two characters.
fn word_border(text: &str) -> usize {
    let bytes = text.as_bytes();
    let is_border = |at: &usize| {
        let around = &bytes[at - 1..at + 2];
        around[0].is_ascii_alphabetic() && around[1] == b' ' && around[2].is_ascii_alphabetic()
    };
    (PIECE / 2..PIECE).rev().find(is_border).unwrap_or_else(|| {
        (0..=PIECE).rev().find(|&at| text.is_char_boundary(at)).unwrap_or_default()
    })
}

fn jsonl(path: &Path, chunks: &mut Chunks<'_>) -> Result<(), CorpusError> {
    let stop = chunks.stop;
    let mut result = Ok(());
    lines::read(path, stop, rows::document, |line, row| {
        if result.is_err() {
            return;
        }
        result = match &row {
            Row::Messages { messages, .. } => {
                let chat = Conversation { row: row.clone(), path: path.into(), line: line.number };
                chunks.chat(messages, chat)
            }
            Row::Text(text) => chunks.document(text),
            Row::Tokens { .. } | Row::PromptCompletion { .. } | Row::Alpaca { .. } => {
                unreachable!("`rows::document` returns text or messages")
            }
        };
    })?;
    result
}

fn column(path: &Path, chunks: &mut Chunks<'_>) -> Result<(), CorpusError> {
    let reader = parquet::open(path)?;
    let schema = reader.metadata().file_metadata().schema_descr_ptr();
    let names: Vec<String> = schema.columns().iter().map(|column| column.path().string()).collect();
    let Some(column) = names.iter().position(|name| name == TEXT) else {
        let reason = format!("no column {TEXT:?}, found {}", names.join(", "));
        return Err(parquet::fault(path, reason).into());
    };
    // A value has the highest definition level, a null a lower one.
    let highest = schema.column(column).max_def_level();
    let mut row = 0u64;
    for group in 0..reader.num_row_groups() {
        let column_reader =
            guarded(path, || reader.get_row_group(group)?.get_column_reader(column))?;
        let ColumnReader::ByteArrayColumnReader(mut reader) = column_reader else {
            let found = schema.column(column).physical_type();
            let reason = format!("column {TEXT:?} has type {found}, needed strings");
            return Err(parquet::fault(path, reason).into());
        };
        loop {
            let (mut levels, mut values) = (Vec::new(), Vec::new());
            let (rows, ..) = guarded(path, || {
                reader.read_records(ROWS_AT_A_TIME, Some(&mut levels), None, &mut values)
            })?;
            if rows == 0 {
                break;
            }
            let mut values = values.iter();
            for i in 0..rows {
                row += 1;
                if levels.get(i).is_some_and(|level| *level < highest) {
                    continue;
                }
                let Some(value) = values.next() else { break };
                let text = std::str::from_utf8(value.data()).map_err(|error| {
                    let byte = error.valid_up_to();
                    let reason = format!("row {row}, column {TEXT:?}: byte {byte} is not UTF-8");
                    parquet::fault(path, reason)
                })?;
                chunks.document(text)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(bytes: &[u8]) -> Result<Vec<DocumentPiece>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("some.txt");
        std::fs::write(&path, bytes).unwrap();
        let mut found = Vec::new();
        let mut take = |pieces: &[DocumentPiece]| {
            found.extend_from_slice(pieces);
            Ok(())
        };
        let read = read_documents(&[path], &AtomicBool::new(false), &mut take);
        read.map(|()| found).map_err(|error| error.to_string())
    }

    #[test]
    fn border_lines_separate_documents_of_a_text_file() {
        let check = |text: &str, needed: &[&str]| {
            let found = pieces(text.as_bytes()).unwrap();
            let texts: Vec<&str> = found.iter().map(|piece| &*piece.text).collect();
            assert_eq!(texts, needed, "{text:?}");
            assert!(found.iter().all(|piece| piece.first && piece.last));
        };
        check("", &[]);
        check(" \n\n", &[]);
        check("one\ntwo\n", &["one\ntwo\n"]);
        check("\u{feff}one", &["one"]);
        check("one\n\n<|endoftext|>\ntwo", &["one\n", "two"]);
        check("one\r\n<|endoftext|>\r\ntwo\r\n", &["one", "two\r\n"]);
        check("<|endoftext|>\n<|endoftext|>\none\n<|endoftext|>", &["one"]);
        check("a <|endoftext|>\n<|endoftext|> b", &["a <|endoftext|>\n<|endoftext|> b"]);
    }

    #[test]
    fn jsonl_may_mix_texts_and_conversations() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        let rows = "{\"text\": \"one\"}\n{\"messages\": [{\"role\": \"user\", \"content\": \"Why?\"}, \
                    {\"role\": \"assistant\", \"content\": \"So.\"}]}\n";
        std::fs::write(&path, rows).unwrap();
        let mut found = Vec::new();
        let mut take = |pieces: &[DocumentPiece]| {
            found.extend_from_slice(pieces);
            Ok(())
        };
        read_documents(std::slice::from_ref(&path), &AtomicBool::new(false), &mut take).unwrap();
        let texts: Vec<(&str, bool)> =
            found.iter().map(|piece| (&*piece.text, piece.chat.is_some())).collect();
        assert_eq!(texts, [("one", false), ("Why?\nSo.", true)]);
        std::fs::write(&path, "{\"prompt\": \"p\"}").unwrap();
        let error = read_documents(&[path], &AtomicBool::new(false), &mut |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("needs `text` or `messages`"), "{error}");
    }

    #[test]
    fn pieces_of_a_long_document_concatenate_to_it() {
        let words = "some words é 日本 ".repeat(PIECE / 5);
        let one_word = "é".repeat(2 * PIECE);
        for text in [&words, &one_word, &format!("x{one_word}")] {
            let found = pieces(text.as_bytes()).unwrap();
            assert!(found.len() > 2);
            assert!(found.iter().all(|piece| piece.text.len() <= 2 * PIECE));
            assert!(found[0].first && found.iter().skip(1).all(|piece| !piece.first));
            let (last, others) = found.split_last().unwrap();
            assert!(last.last && others.iter().all(|piece| !piece.last));
            assert_eq!(found.iter().map(|piece| &*piece.text).collect::<String>(), **text);
        }
        let found = pieces(words.as_bytes()).unwrap();
        assert!(found.iter().skip(1).all(|piece| piece.text.starts_with(" words")));
        // Several documents, the long one among short ones.
        let found = pieces(format!("a\n<|endoftext|>\n{words}\n<|endoftext|>\nb").as_bytes());
        let found = found.unwrap();
        assert_eq!(found.iter().filter(|piece| piece.first).count(), 3);
        assert_eq!(found.iter().filter(|piece| piece.last).count(), 3);
    }

    #[test]
    fn invalid_utf8_is_reported_with_its_position() {
        let long = "é".repeat(3 * PIECE);
        let check = |before: &str, bytes: &[u8]| {
            let file = [before.as_bytes(), bytes, b" and more"].concat();
            let error = pieces(&file).unwrap_err();
            let needed = format!("some.txt: byte {} is not UTF-8", before.len());
            assert!(error.ends_with(&needed), "{error}, needed {needed}");
        };
        check("", b"\xff");
        check("\u{feff}ab", b"\xc3");
        check("one\n<|endoftext|>\ntwo\r\n<|endoftext|>\nthree", b"\xed\xa0\x80");
        check(&long, b"\x80");
        check(&format!("x{long}\n<|endoftext|>\n{long}"), b"\xf5");
    }
}
