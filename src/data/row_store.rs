//! The row store: tokenized rows as two byte arrays, in memory or memory-mapped from a cache folder, so
//! that of a large file only the pages that are read take memory.
//!
//! `rows` holds the encoded records one after another (see [`Record`]). `places` is the index: for each
//! row four u64, namely the end of its bytes in `rows`, its row number in the file, its line number and
//! its tag. All numbers are little-endian.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::Example;
use super::cache::hex;
use crate::quant::Bytes;

/// Bytes of an index entry.
const LOCATION_BYTES: usize = 32;

/// Supervised examples: tokens and a loss mask each.
pub type Examples = RowStore<Example>;

/// Where a row comes from in its file, and its tag.
#[derive(Debug, Clone, Copy)]
pub struct RowLocation {
    /// The row number in its file, counted from 0 over lines that are not blank.
    pub row: u64,
    /// The line number in its file, counted from 1.
    pub line: u64,
    /// The value of [`Record::tag`].
    pub tag: u64,
}

/// A kind of row that the row store holds in encoded form.
pub trait Record: Sized + Clone {
    /// Appends the encoded record to `bytes`.
    fn encode(&self, bytes: &mut Vec<u8>);

    /// A number stored in the index, next to the record.
    fn tag(&self) -> u64;

    /// Decodes a record from bytes that [`Record::encode`] wrote.
    fn decode(bytes: &[u8], place: RowLocation) -> Self;

    /// Number of tokens of an encoded record.
    fn tokens_in(bytes: &[u8], tag: u64) -> usize;

    /// Adds the tokens of the record to a fingerprint.
    fn hash(&self, hasher: &mut Sha256);
}

/// The rows of one or several files, in file order.
#[derive(Debug, Clone)]
pub struct RowStore<T> {
    files: Vec<StoredFile>,
    /// Number of rows before each file, then the total.
    starts: Vec<usize>,
    kind: PhantomData<T>,
}

/// The rows of one file.
#[derive(Debug, Clone)]
struct StoredFile {
    rows: Bytes,
    places: Bytes,
    /// Whether the arrays are memory-mapped from disk.
    mapped: bool,
    /// Number of rows in the files before this one, so that row numbers are unique across files.
    first_row: u64,
}

impl StoredFile {
    /// The index entry of a row: end of its bytes, row, line, tag.
    fn place(&self, index: usize) -> [u64; 4] {
        let bytes = &self.places[index * LOCATION_BYTES..(index + 1) * LOCATION_BYTES];
        let (numbers, _) = bytes.as_chunks();
        std::array::from_fn(|i| u64::from_le_bytes(numbers[i]))
    }

    /// The encoded bytes of a row.
    fn bytes(&self, index: usize) -> &[u8] {
        let start = index.checked_sub(1).map_or(0, |before| self.place(before)[0]);
        &self.rows[start as usize..self.place(index)[0] as usize]
    }
}

impl<T> Default for RowStore<T> {
    fn default() -> Self {
        Self { files: Vec::new(), starts: Vec::new(), kind: PhantomData }
    }
}

impl<T: Record> RowStore<T> {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.starts.last().copied().unwrap_or_default()
    }

    /// Whether the store has no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn find(&self, index: usize) -> (&StoredFile, usize) {
        let file = self.starts.partition_point(|&start| start <= index) - 1;
        (&self.files[file], index - self.starts[file])
    }

    /// Number of tokens of a row.
    ///
    /// # Panics
    /// If `index` is out of range; the other methods that take an index panic likewise.
    pub fn length(&self, index: usize) -> usize {
        let (file, index) = self.find(index);
        T::tokens_in(file.bytes(index), file.place(index)[3])
    }

    /// Number of tokens of every row, in order.
    pub fn lengths(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        (0..self.len()).map(|index| self.length(index))
    }

    /// The encoded bytes of a row.
    pub(super) fn encoded(&self, index: usize) -> &[u8] {
        let (file, index) = self.find(index);
        file.bytes(index)
    }

    /// Decodes a row.
    pub fn get(&self, index: usize) -> T {
        let (file, index) = self.find(index);
        let [_, row, line, tag] = file.place(index);
        T::decode(file.bytes(index), RowLocation { row: file.first_row + row, line, tag })
    }

    /// Decodes all rows, one at a time.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = T> + '_ {
        (0..self.len()).map(|index| self.get(index))
    }

    /// Bytes held in memory, and an estimate of the resident mapped bytes after `taken` rows were read:
    /// the whole index, and for each row the pages that the system reads ahead around it.
    pub fn bytes(&self, taken: usize) -> [usize; 2] {
        const READ_AT_ONCE: usize = 64 << 10;
        let (mapped, held): (Vec<&StoredFile>, Vec<&StoredFile>) =
            self.files.iter().partition(|file| file.mapped);
        let rows = |store: &[&StoredFile]| store.iter().map(|file| file.rows.len()).sum::<usize>();
        let places =
            |store: &[&StoredFile]| store.iter().map(|file| file.places.len()).sum::<usize>();
        let looked_at = rows(&mapped).min(taken.saturating_mul(READ_AT_ONCE));
        [rows(&held) + places(&held), looked_at + places(&mapped)]
    }

    /// Appends the store of another file; `rows` is the number of rows of the files so far.
    pub(super) fn append(&mut self, other: Self, rows: u64) {
        let before = self.len();
        if self.starts.is_empty() {
            self.starts.push(0);
        }
        self.starts.extend(other.starts.iter().skip(1).map(|start| before + start));
        let store = other.files.into_iter();
        self.files
            .extend(store.map(|file| StoredFile { first_row: file.first_row + rows, ..file }));
    }

    /// A store over the two arrays; `None` if they do not belong together.
    pub(super) fn new([rows, places]: [Bytes; 2], mapped: bool) -> Option<Self> {
        let count = places.len() / LOCATION_BYTES;
        let file = StoredFile { rows, places, mapped, first_row: 0 };
        let end = count.checked_sub(1).map_or(0, |last| file.place(last)[0]);
        let whole = file.places.len() == count * LOCATION_BYTES && file.rows.len() as u64 == end;
        whole.then(|| Self { files: vec![file], starts: vec![0, count], kind: PhantomData })
    }
}

impl RowStore<Example> {
    /// Number of rows of the file that have at least one example.
    pub fn rows(&self) -> u64 {
        let first = |file: &StoredFile, index| file.place(index)[3] == 0;
        let count = |file: &StoredFile| {
            (0..file.places.len() / LOCATION_BYTES).filter(|&index| first(file, index)).count()
        };
        self.files.iter().map(count).sum::<usize>() as u64
    }
}

/// Reads little-endian u32 words one after another.
pub(super) struct WordReader<'a>(&'a [[u8; 4]]);

impl<'a> WordReader<'a> {
    pub fn of(bytes: &'a [u8]) -> Self {
        Self(bytes.as_chunks().0)
    }

    /// The next `count` words.
    pub fn take(&mut self, count: usize) -> impl Iterator<Item = u32> + use<'a> {
        let (taken, rest) = self.0.split_at(count);
        self.0 = rest;
        taken.iter().map(|word| u32::from_le_bytes(*word))
    }

    /// The next word; 0 at the end.
    pub fn next(&mut self) -> u32 {
        self.take(1).next().unwrap_or_default()
    }

    /// All remaining words.
    pub fn rest(&mut self) -> impl Iterator<Item = u32> + use<'a> {
        self.take(self.0.len())
    }
}

/// Appends u32 words to `bytes`, little-endian.
pub(super) fn write_words(words: impl IntoIterator<Item = u32>, bytes: &mut Vec<u8>) {
    words.into_iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
}

/// Builds a row store, one row after another.
pub(super) struct RowStoreWriter<T> {
    rows: ByteSink,
    places: ByteSink,
    end: u64,
    hasher: Sha256,
    row: Vec<u8>,
    kind: PhantomData<T>,
}

/// Where written bytes go.
pub(super) enum ByteSink {
    Nowhere,
    Memory(Vec<u8>),
    File(BufWriter<File>),
}

impl ByteSink {
    /// A file in `folder`, or memory if there is no folder.
    pub fn new(folder: Option<&Path>, name: &str) -> io::Result<Self> {
        Ok(match folder {
            Some(folder) => Self::File(BufWriter::new(File::create(folder.join(name))?)),
            None => Self::Memory(Vec::new()),
        })
    }

    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Nowhere => Ok(()),
            Self::Memory(memory) => {
                memory.extend_from_slice(bytes);
                Ok(())
            }
            Self::File(file) => file.write_all(bytes),
        }
    }

    /// The bytes kept in memory, if any; a file is synced to disk before this returns.
    pub fn finish(self) -> io::Result<Vec<u8>> {
        match self {
            Self::Nowhere => Ok(Vec::new()),
            Self::Memory(mut memory) => {
                memory.shrink_to_fit();
                Ok(memory)
            }
            Self::File(file) => {
                file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
                Ok(Vec::new())
            }
        }
    }
}

/// File names of the two arrays in a cache folder.
pub(super) fn names(part: &str) -> [String; 2] {
    [format!("{part}.rows"), format!("{part}.places")]
}

impl<T: Record> RowStoreWriter<T> {
    /// A writer to files in `folder`, or to memory if there is no folder.
    pub fn new(folder: Option<&Path>, part: &str) -> io::Result<Self> {
        let [rows, places] = names(part);
        Ok(Self::into(ByteSink::new(folder, &rows)?, ByteSink::new(folder, &places)?))
    }

    /// A writer that discards all rows.
    pub fn nowhere() -> Self {
        Self::into(ByteSink::Nowhere, ByteSink::Nowhere)
    }

    fn into(rows: ByteSink, places: ByteSink) -> Self {
        let (hasher, row) = (Sha256::new(), Vec::new());
        Self { rows, places, end: 0, hasher, row, kind: PhantomData }
    }

    /// Appends a record, with the row and line number that it comes from.
    pub fn push(&mut self, kept: &T, row: u64, line: u64) -> io::Result<()> {
        self.row.clear();
        kept.encode(&mut self.row);
        kept.hash(&mut self.hasher);
        self.rows.write(&self.row)?;
        self.end += self.row.len() as u64;
        let place = [self.end, row, line, kept.tag()];
        self.places.write(place.map(u64::to_le_bytes).as_flattened())
    }

    /// The store, empty unless the rows were kept in memory, and a hash of all tokens.
    pub fn finish(self) -> io::Result<(RowStore<T>, String)> {
        let sha256 = hex(&self.hasher.finalize());
        let in_memory = |bytes| Bytes::new(Arc::new(bytes));
        let arrays = [self.rows.finish()?, self.places.finish()?].map(in_memory);
        Ok((RowStore::new(arrays, false).expect("both arrays were just written"), sha256))
    }
}

impl Record for Example {
    /// One word per token: the id shifted left by one, with the loss mask in the lowest bit.
    fn encode(&self, bytes: &mut Vec<u8>) {
        let tokens = self.tokens.iter().zip(&self.learned);
        write_words(tokens.map(|(token, learned)| token << 1 | u32::from(*learned)), bytes);
    }

    fn tag(&self) -> u64 {
        self.start.into()
    }

    fn decode(bytes: &[u8], RowLocation { row, line, tag }: RowLocation) -> Self {
        Self {
            tokens: WordReader::of(bytes).rest().map(|word| word >> 1).collect(),
            learned: WordReader::of(bytes).rest().map(|word| word & 1 == 1).collect(),
            row,
            line,
            start: tag as u32,
        }
    }

    fn tokens_in(bytes: &[u8], _tag: u64) -> usize {
        bytes.len() / size_of::<u32>()
    }

    fn hash(&self, hasher: &mut Sha256) {
        let mut bytes = Vec::with_capacity(self.tokens.len() * size_of::<u32>());
        self.encode(&mut bytes);
        hasher.update((self.tokens.len() as u64).to_le_bytes());
        hasher.update(bytes);
    }
}

/// Adds a list of tokens to a hash.
pub(super) fn hash_tokens(tokens: &[u32], hasher: &mut Sha256) {
    let mut bytes = Vec::with_capacity(size_of_val(tokens));
    write_words(tokens.iter().copied(), &mut bytes);
    hasher.update((tokens.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

#[cfg(test)]
mod tests {
    use super::super::{Comparison, PreferencePair, Prompt};
    use super::*;

    /// Writes records to memory and to files, and checks that both decode to the same.
    fn check<T: Record + PartialEq + std::fmt::Debug>(all: &[T], lengths: &[usize]) -> RowStore<T> {
        let folder = tempfile::tempdir().unwrap();
        let mut in_memory = RowStoreWriter::new(None, "x").unwrap();
        let mut on_disk = RowStoreWriter::new(Some(folder.path()), "x").unwrap();
        // Rows 3, 4 and so on, lines 10, 11 and so on.
        for (i, kept) in (0..).zip(all) {
            in_memory.push(kept, 3 + i, 10 + i).unwrap();
            on_disk.push(kept, 3 + i, 10 + i).unwrap();
        }
        let (store, sha256) = in_memory.finish().unwrap();
        assert_eq!(on_disk.finish().unwrap().1, sha256);
        let arrays = names("x")
            .map(|name| Bytes::new(Arc::new(std::fs::read(folder.path().join(name)).unwrap())));
        let mapped = RowStore::new(arrays.clone(), true).unwrap();
        let [rows, places] = arrays;
        assert!(RowStore::<T>::new([rows.slice(1..rows.len()).unwrap(), places], true).is_none());
        for found in [&store, &mapped] {
            assert_eq!(found.iter().collect::<Vec<_>>(), all);
            assert!(found.lengths().eq(lengths.iter().copied()));
        }
        let everything = usize::MAX;
        assert_eq!([store.bytes(everything)[1], mapped.bytes(everything)[0]], [0, 0]);
        assert_eq!(store.bytes(0)[0], mapped.bytes(everything)[1]);
        assert_eq!(mapped.bytes(0)[1], all.len() * LOCATION_BYTES);
        store
    }

    #[test]
    fn examples_round_trip_and_differ_across_files() {
        let example = |row: u64, start, tokens: Vec<u32>| Example {
            learned: tokens.iter().map(|token| token % 2 == 1).collect(),
            tokens,
            row,
            line: row + 7,
            start,
        };
        let all = [
            example(3, 0, vec![5, 6, (1 << 31) - 1]),
            example(4, 3, vec![8]),
            example(5, 0, vec![]),
            example(6, 0, vec![1, 2, 3, 4]),
        ];
        let mut examples = check(&all, &[3, 1, 0, 4]);
        assert_eq!(examples.rows(), 3);
        examples.append(examples.clone(), 10);
        assert_eq!((examples.len(), examples.get(5)), (8, Example { row: 14, ..all[1].clone() }));
        assert_eq!(examples.get(7).row, 16);
        let mut empty = Examples::default();
        empty.append(examples.clone(), 0);
        assert!(empty.iter().eq(examples.iter()));
    }

    #[test]
    fn comparisons_round_trip() {
        let pair = |better, worse, margin| PreferencePair { better, worse, margin };
        let comparison = |row: u64, responses: &[&[u32]], pairs, label| Comparison {
            prompt: (0..row as u32).collect(),
            responses: responses.iter().map(|response| response.to_vec()).collect(),
            pairs,
            label,
            row,
            line: row + 7,
        };
        let all = [
            comparison(3, &[&[5], &[u32::MAX, 7]], vec![pair(1, 0, -1.5)], None),
            comparison(4, &[&[8, 9]], vec![], Some(true)),
            comparison(5, &[&[]], vec![], Some(false)),
            comparison(6, &[&[1], &[2], &[3]], vec![pair(0, 1, 0.0), pair(0, 2, 0.1)], None),
        ];
        let comparisons = check(&all, &[6, 6, 5, 9]);
        assert!((0..4).map(|row| comparisons.responses(row)).eq([2, 1, 1, 3]));
    }

    #[test]
    fn prompts_round_trip() {
        let row = r#"{"prompt": "ü?", "answer": [3.50, null, {"b": 1, "a": 1e300}], "price": 0.1}"#;
        let prompt = |line, tokens: &[u32], row: &str| Prompt {
            tokens: tokens.to_vec(),
            text: "ü?".repeat(tokens.len()),
            row: serde_json::from_str(row).unwrap(),
            line,
        };
        check(&[prompt(10, &[1, 2, 3], row), prompt(11, &[], "{}")], &[3, 0]);
    }
}
