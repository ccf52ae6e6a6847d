//! The tokens of a source on disk, written once and memory-mapped from then on.
//!
//! A shard is a folder, named by a hash of everything its tokens depend on. It holds `train.tokens` and
//! `validation.tokens`, arrays of little-endian u16 (u32 for larger vocabularies), and `shard.json`. Both
//! arrays are documents one after another, each followed by the end-of-text token, which never occurs
//! within a text. So these tokens mark the borders, and no separate index is needed.
//!
//! The folder is written by [`crate::data::cache`], so a shard that exists is complete.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::UNIX_EPOCH;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::documents::{DocumentPiece, has_lines, read_documents};
use super::{CorpusError, SourceSpec, matching_files};
use crate::data::cache::{self, hex};
use crate::data::split;
use crate::monitor::Monitor;
use crate::quant::Bytes;
use crate::text::{ChatTemplate, Special, TextError, Tokenizer};
use crate::weights::{map_file, write_atomically};

/// Version of the shard format. Raise it whenever the same files would give other tokens.
const FORMAT: u32 = 1;
const HEADER: &str = "shard.json";

/// Progress of tokenizing a source.
#[derive(Debug, Clone, Copy)]
pub struct Tokenizing<'a> {
    /// Name of the source.
    pub source: &'a str,
    /// Bytes of text tokenized so far.
    pub bytes: u64,
    /// Total bytes of its files.
    pub of: u64,
}

/// The tokens that mark borders of documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Borders {
    /// Follows every document.
    pub end: u32,
    /// Precedes every document, for models trained with BOS; never predicted.
    pub bos: Option<u32>,
}

impl Borders {
    /// The border tokens of a tokenizer: its end-of-text token, or else EOS, and BOS if it adds it.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Result<Self, CorpusError> {
        let special = |name: &&str| {
            let id = tokenizer.id_of(name)?;
            tokenizer.is_special(id).then_some(id)
        };
        let named = ["<|endoftext|>", "<|end_of_text|>"].iter().find_map(special);
        let Some(end) = named.or(tokenizer.eos()) else {
            let reason = "no token that ends a document, needed `<|endoftext|>` or an EOS token";
            return Err(TextError::Tokenizer(reason.into()).into());
        };
        let bos = tokenizer.bos().filter(|&bos| tokenizer.adds_bos() && bos != end);
        Ok(Self { end, bos })
    }

    /// Whether a document's context begins with this token: BOS, or the end of the one before it.
    pub(crate) fn begins_document(self, token: u32) -> bool {
        token == self.bos.unwrap_or(self.end)
    }
}

/// Everything that the tokens of a shard depend on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct ShardOrigin {
    format: u32,
    tokenizer: String,
    /// Fingerprint of the chat template and its pinned date, if a file may contain conversations.
    template: Option<String>,
    borders: Borders,
    /// Number of bytes per token.
    width: usize,
    validation_split: f64,
    files: Vec<FilePrint>,
}

/// A source file, identified by its size and modification time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct FilePrint {
    path: PathBuf,
    bytes: u64,
    /// Nanoseconds since 1970.
    modified: u64,
}

/// Counts over the training or validation part of a source.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Totals {
    pub documents: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// Tokens, border tokens included.
    pub tokens: u64,
    /// SHA-256 of the token file, in hex.
    pub sha256: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct ShardHeader {
    origin: ShardOrigin,
    train: Totals,
    validation: Totals,
}

/// The tokens of a source.
#[derive(Debug)]
pub(super) struct Shard {
    pub files: usize,
    pub train: TokenRing,
    pub validation: TokenRing,
}

/// The tokens of one part, read as a ring: the first document follows the last.
#[derive(Debug)]
pub(super) struct TokenRing {
    pub totals: Totals,
    width: usize,
    /// The mapped tokens; `None` if there are none.
    map: Option<Bytes>,
}

impl TokenRing {
    /// Appends `count` tokens from `start` on, wrapping around as often as needed.
    ///
    /// # Panics
    /// If the part has no tokens.
    pub(crate) fn read(&self, start: u64, count: usize, tokens: &mut Vec<u32>) {
        let map = self.map.as_deref().expect("only parts with tokens are read");
        let needed = tokens.len() + count;
        let mut at = (start % self.totals.tokens) as usize;
        while tokens.len() < needed {
            let end = map.len().min((at + needed - tokens.len()) * self.width);
            let bytes = &map[at * self.width..end];
            match self.width {
                2 => tokens
                    .extend(bytes.as_chunks().0.iter().map(|b| u32::from(u16::from_le_bytes(*b)))),
                _ => tokens.extend(bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b))),
            }
            at = 0;
        }
    }

    fn open(folder: &Path, name: &str, totals: Totals, width: usize) -> Result<Self, CorpusError> {
        let path = folder.join(name);
        let bad = |reason: String| CorpusError::Shard { path: path.clone(), reason };
        let length = fs::metadata(&path).map_err(|error| bad(error.to_string()))?.len();
        let needed = totals.tokens * width as u64;
        if length != needed {
            return Err(bad(format!("has {length} bytes, needed {needed}")));
        }
        if length == 0 {
            return Ok(Self { totals, width, map: None });
        }
        let map = map_file(&path).map_err(|error| bad(error.to_string()))?;
        if hex(&Sha256::digest(&*map)) != totals.sha256 {
            return Err(bad("has changed since it was written".into()));
        }
        Ok(Self { totals, width, map: Some(map) })
    }
}

/// Opens the shard of a source, after tokenizing its files if `cache` has no shard for them.
pub(super) fn open(
    spec: &SourceSpec,
    tokenizer: &Tokenizer,
    borders: Borders,
    validation_split: f64,
    cache: &Path,
    monitor: Monitor<'_>,
    on_progress: &mut dyn FnMut(Tokenizing<'_>),
) -> Result<Shard, CorpusError> {
    let files = matching_files(&spec.glob)?;
    let template = tokenizer.chat_template().filter(|_| files.iter().any(|path| has_lines(path)));
    let origin = ShardOrigin {
        format: FORMAT,
        tokenizer: tokenizer.fingerprint()?,
        template: template.map(ChatTemplate::fingerprint),
        borders,
        width: if tokenizer.vocab_size() <= 1 << 16 { 2 } else { 4 },
        validation_split,
        files: files.iter().map(|path| file_print(path)).collect::<Result<_, _>>()?,
    };
    let key = hex(&Sha256::digest(serde_json::to_vec(&origin).expect("plain data")));
    let waiting = |holder: &str| {
        let cache = cache.display();
        monitor.note(format_args!("waiting for {holder}, which is tokenizing into {cache}"));
    };
    let folder = cache::folder(cache, (&spec.name, &key[..16]), monitor.stop, waiting, |folder| {
        tokenize(spec, tokenizer, &origin, &files, folder, monitor.stop, on_progress)
    })?;
    let path = folder.join(HEADER);
    let bad = |reason: String| CorpusError::Shard { path: path.clone(), reason };
    let text = fs::read_to_string(&path).map_err(|error| bad(error.to_string()))?;
    let header: ShardHeader =
        serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
    if header.origin != origin {
        return Err(bad("belongs to other files or another tokenizer".into()));
    }
    let width = origin.width;
    Ok(Shard {
        files: files.len(),
        train: TokenRing::open(&folder, "train.tokens", header.train, width)?,
        validation: TokenRing::open(&folder, "validation.tokens", header.validation, width)?,
    })
}

fn file_print(path: &Path) -> Result<FilePrint, CorpusError> {
    let about = fs::metadata(path).map_err(CorpusError::io("read", path))?;
    let modified = about.modified().map_err(CorpusError::io("read", path))?;
    let modified = modified.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    Ok(FilePrint { path: path.into(), bytes: about.len(), modified })
}

/// Tokenizes a source into a folder.
fn tokenize(
    spec: &SourceSpec,
    tokenizer: &Tokenizer,
    origin: &ShardOrigin,
    files: &[PathBuf],
    folder: &Path,
    stop: &AtomicBool,
    on_progress: &mut dyn FnMut(Tokenizing<'_>),
) -> Result<(), CorpusError> {
    let mut train = TokenWriter::new(folder.join("train.tokens"), origin)?;
    let mut validation = TokenWriter::new(folder.join("validation.tokens"), origin)?;
    let of = origin.files.iter().map(|file| file.bytes).sum();
    let mut held_out = false;
    let end = Borders::of(tokenizer)?.end;
    read_documents(files, stop, &mut |pieces: &[DocumentPiece]| {
        let encode = |piece: &DocumentPiece| -> Result<Vec<u32>, CorpusError> {
            match &piece.chat {
                Some(chat) => {
                    let mut tokens = chat.tokens(tokenizer)?;
                    // The template may end with the end-of-text token, which is appended to every
                    // document anyway.
                    tokens.pop_if(|last| *last == end);
                    Ok(tokens)
                }
                None => Ok(tokenizer.encode(&piece.text, Special::AsText)?),
            }
        };
        let encoded: Vec<Vec<u32>> = pieces.par_iter().map(encode).collect::<Result<_, _>>()?;
        for (piece, tokens) in pieces.iter().zip(encoded) {
            if piece.first {
                held_out = split::is_in_share(&piece.text, origin.validation_split);
            }
            let part = if held_out { &mut validation } else { &mut train };
            part.write(piece, &tokens)?;
        }
        let bytes = train.totals.bytes + validation.totals.bytes;
        on_progress(Tokenizing { source: &spec.name, bytes, of });
        Ok(())
    })?;
    let documents = train.totals.documents + validation.totals.documents;
    if documents == 0 {
        return Err(CorpusError::Empty { name: spec.name.clone(), files: files.len() });
    }
    if train.totals.documents == 0 {
        let (name, split) = (spec.name.clone(), origin.validation_split);
        return Err(CorpusError::AllHeldOut { name, documents, split });
    }
    let origin = origin.clone();
    let header = ShardHeader { origin, train: train.finish()?, validation: validation.finish()? };
    let json = serde_json::to_string_pretty(&header).expect("plain data");
    let path = folder.join(HEADER);
    write_atomically(&path, |file| file.write_all(json.as_bytes()))
        .map_err(|error| CorpusError::io("write", &path)(std::io::Error::other(error.to_string())))
}

/// Writes the token file of one part.
struct TokenWriter {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: Sha256,
    borders: Borders,
    width: usize,
    totals: Totals,
}

impl TokenWriter {
    fn new(path: PathBuf, origin: &ShardOrigin) -> Result<Self, CorpusError> {
        let file = BufWriter::new(File::create(&path).map_err(CorpusError::io("write", &path))?);
        let (borders, width) = (origin.borders, origin.width);
        Ok(Self { path, file, hasher: Sha256::new(), borders, width, totals: Totals::default() })
    }

    fn write(&mut self, piece: &DocumentPiece, tokens: &[u32]) -> Result<(), CorpusError> {
        let before = self.borders.bos.filter(|_| piece.first);
        let after = Some(self.borders.end).filter(|_| piece.last);
        let mut bytes = Vec::with_capacity((tokens.len() + 2) * self.width);
        for token in before.iter().chain(tokens).chain(&after) {
            bytes.extend_from_slice(&token.to_le_bytes()[..self.width]);
        }
        self.totals.documents += u64::from(piece.last);
        self.totals.bytes += piece.text.len() as u64;
        self.totals.tokens += (bytes.len() / self.width) as u64;
        self.hasher.update(&bytes);
        self.file.write_all(&bytes).map_err(CorpusError::io("write", &self.path))
    }

    fn finish(self) -> Result<Totals, CorpusError> {
        let Self { path, file, hasher, mut totals, .. } = self;
        totals.sha256 = hex(&hasher.finalize());
        let file = file.into_inner().map_err(|error| error.into_error());
        file.and_then(|file| file.sync_all()).map_err(CorpusError::io("write", &path))?;
        Ok(totals)
    }
}
