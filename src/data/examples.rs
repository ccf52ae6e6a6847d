//! Examples as two arrays of bytes, in memory or mapped from the files of a cache: of the largest file
//! no more is held than what is looked at.
//!
//! `words`: for each token a little-endian u32, its id above the lowest bit, which says whether it is
//! learned. `places`: for each example four u64, where its words end, its row, its line and its start.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::Example;
use super::cache::hex;
use crate::quant::Bytes;

/// Bytes of a place.
const PLACE: usize = 32;
/// Bytes of a word.
const WORD: usize = 4;

/// The examples of one or several files, in their order.
#[derive(Debug, Clone, Default)]
pub struct Examples {
    shelves: Vec<Shelf>,
    /// Examples before each shelf, and all of them.
    starts: Vec<usize>,
}

/// Those of one file.
#[derive(Debug, Clone)]
struct Shelf {
    words: Bytes,
    places: Bytes,
    /// Rows of the files before this one: rows are told apart across files.
    first_row: u64,
}

impl Shelf {
    /// The four numbers of an example.
    fn place(&self, index: usize) -> [u64; 4] {
        let bytes = &self.places[index * PLACE..(index + 1) * PLACE];
        let (numbers, _) = bytes.as_chunks();
        std::array::from_fn(|i| u64::from_le_bytes(numbers[i]))
    }

    fn end(&self, index: usize) -> u64 {
        self.place(index)[0]
    }

    fn start(&self, index: usize) -> u64 {
        index.checked_sub(1).map_or(0, |before| self.end(before))
    }
}

impl Examples {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.starts.last().copied().unwrap_or_default()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn find(&self, index: usize) -> (&Shelf, usize) {
        let shelf = self.starts.partition_point(|&start| start <= index) - 1;
        (&self.shelves[shelf], index - self.starts[shelf])
    }

    /// The tokens of an example.
    ///
    /// # Panics
    /// If there is no such example, here as below.
    pub fn length(&self, index: usize) -> usize {
        let (shelf, index) = self.find(index);
        (shelf.end(index) - shelf.start(index)) as usize
    }

    /// The same of all.
    pub fn lengths(&self) -> Vec<usize> {
        (0..self.len()).map(|index| self.length(index)).collect()
    }

    /// An example, read anew.
    pub fn get(&self, index: usize) -> Example {
        let (shelf, index) = self.find(index);
        let [end, row, line, start] = shelf.place(index);
        let words = &shelf.words[shelf.start(index) as usize * WORD..end as usize * WORD];
        let (words, _) = words.as_chunks();
        let words = || words.iter().map(|word| u32::from_le_bytes(*word));
        Example {
            tokens: words().map(|word| word >> 1).collect(),
            learned: words().map(|word| word & 1 == 1).collect(),
            row: shelf.first_row + row,
            line,
            start: start as u32,
        }
    }

    /// Bytes they take, in memory or mapped.
    pub fn bytes(&self) -> usize {
        self.shelves.iter().map(|shelf| shelf.words.len() + shelf.places.len()).sum()
    }

    /// All of them, one at a time.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Example> + '_ {
        (0..self.len()).map(|index| self.get(index))
    }

    /// Rows that have examples here.
    pub fn rows(&self) -> u64 {
        let first = |shelf: &Shelf, index| shelf.place(index)[3] == 0;
        let count = |shelf: &Shelf| {
            (0..shelf.places.len() / PLACE).filter(|&index| first(shelf, index)).count()
        };
        self.shelves.iter().map(count).sum::<usize>() as u64
    }

    /// Puts those of another file behind these, which are of `rows` rows.
    pub(super) fn append(&mut self, other: Self, rows: u64) {
        let before = self.len();
        if self.starts.is_empty() {
            self.starts.push(0);
        }
        self.starts.extend(other.starts.iter().skip(1).map(|start| before + start));
        let shelves = other.shelves.into_iter();
        self.shelves
            .extend(shelves.map(|shelf| Shelf { first_row: shelf.first_row + rows, ..shelf }));
    }

    /// From the two arrays, if they belong together.
    pub(super) fn new(words: Bytes, places: Bytes) -> Option<Self> {
        let count = places.len() / PLACE;
        let shelf = Shelf { words, places, first_row: 0 };
        let tokens = shelf.start(count);
        let whole = shelf.places.len() == count * PLACE
            && shelf.words.len() as u64 == tokens.checked_mul(WORD as u64)?;
        whole.then(|| Self { shelves: vec![shelf], starts: vec![0, count] })
    }
}

/// Makes examples, one after another.
pub(super) struct ExamplesWriter {
    words: Sink,
    places: Sink,
    end: u64,
    hasher: Sha256,
}

/// Where bytes go.
pub(super) enum Sink {
    Nowhere,
    Memory(Vec<u8>),
    File(BufWriter<File>),
}

impl Sink {
    /// A file of a folder, or memory without one.
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

    /// What was kept in memory; a file is on disk when this returns.
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

/// The names of the two arrays in a folder.
pub(super) fn names(part: &str) -> [String; 2] {
    [format!("{part}.words"), format!("{part}.places")]
}

impl ExamplesWriter {
    /// Into files of a folder, or memory.
    pub fn new(folder: Option<&Path>, part: &str) -> io::Result<Self> {
        let [words, places] = names(part);
        let (words, places) = (Sink::new(folder, &words)?, Sink::new(folder, &places)?);
        Ok(Self { words, places, end: 0, hasher: Sha256::new() })
    }

    /// Keeps nothing.
    pub fn nowhere() -> Self {
        Self { words: Sink::Nowhere, places: Sink::Nowhere, end: 0, hasher: Sha256::new() }
    }

    pub fn push(&mut self, example: &Example) -> io::Result<()> {
        let tokens = example.tokens.iter().zip(&example.learned);
        let words =
            tokens.flat_map(|(token, learned)| (token << 1 | u32::from(*learned)).to_le_bytes());
        let words: Vec<u8> = words.collect();
        self.hasher.update((example.tokens.len() as u64).to_le_bytes());
        self.hasher.update(&words);
        self.words.write(&words)?;
        self.end += example.tokens.len() as u64;
        let place = [self.end, example.row, example.line, u64::from(example.start)];
        self.places.write(&place.map(u64::to_le_bytes).concat())
    }

    /// What was kept in memory, and a hash of all tokens and masks.
    pub fn finish(self) -> io::Result<(Examples, String)> {
        let sha256 = hex(&self.hasher.finalize());
        let in_memory = |bytes| Bytes::new(Arc::new(bytes));
        let (words, places) = (self.words.finish()?, self.places.finish()?);
        let examples = Examples::new(in_memory(words), in_memory(places));
        Ok((examples.expect("both were written here"), sha256))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_come_back_from_memory_and_from_files() {
        let example = |row: u64, start, tokens: Vec<u32>| Example {
            learned: tokens.iter().map(|token| token % 2 == 1).collect(),
            tokens,
            row,
            line: row + 7,
            start,
        };
        let all = [
            example(0, 0, vec![5, 6, (1 << 31) - 1]),
            example(0, 3, vec![8]),
            example(4, 0, vec![]),
            example(9, 0, vec![1, 2, 3, 4]),
        ];
        let folder = tempfile::tempdir().unwrap();
        let mut in_memory = ExamplesWriter::new(None, "x").unwrap();
        let mut on_disk = ExamplesWriter::new(Some(folder.path()), "x").unwrap();
        for example in &all {
            in_memory.push(example).unwrap();
            on_disk.push(example).unwrap();
        }
        let (mut examples, sha256) = in_memory.finish().unwrap();
        assert_eq!(on_disk.finish().unwrap().1, sha256);
        let [words, places] = names("x")
            .map(|name| Bytes::new(Arc::new(std::fs::read(folder.path().join(name)).unwrap())));
        let mapped = Examples::new(words.clone(), places.clone()).unwrap();
        assert!(Examples::new(words.slice(4..32).unwrap(), places).is_none());
        for found in [&examples, &mapped] {
            assert!(found.iter().eq(all.iter().cloned()));
            assert_eq!(found.lengths(), [3, 1, 0, 4]);
            assert_eq!(found.rows(), 3);
        }
        examples.append(mapped, 10);
        assert_eq!((examples.len(), examples.get(5)), (8, Example { row: 10, ..all[1].clone() }));
        assert_eq!(examples.get(7).row, 19);
        let mut empty = Examples::default();
        empty.append(examples.clone(), 0);
        assert!(empty.iter().eq(examples.iter()));
    }
}
