//! The KV cache of a batch of rows, whatever backend its decoder computes by.

use std::any::Any;
use std::fmt::Debug;

use candle_core::{Error, Result};

use super::backend::{Backend, with_backend};
use super::cache::{CacheType, RowCaches};
use super::decoder::Decoder;
use crate::ops::BackendKind;

/// The keys and values of a batch of rows, each row of its own length, as a backend keeps them.
#[derive(Debug)]
pub struct KvCache {
    rows: Box<dyn AnyCache>,
    backend: BackendKind,
    /// Rows of more tokens than this have another RoPE scaling (LongRoPE): keys cached before a row grows
    /// beyond are invalid after.
    longrope_threshold: Option<usize>,
}

/// The cache of one backend.
#[derive(Debug)]
pub(super) struct CacheOf<B: Backend> {
    pub rows: B::Cache,
    /// Buffers of a decode step, which are used again by the next. A copy has none of them.
    pub scratch: B::Scratch,
}

impl<B: Backend> CacheOf<B> {
    fn new(rows: B::Cache) -> Self {
        Self { rows, scratch: B::Scratch::default() }
    }

    fn boxed(rows: B::Cache) -> Box<dyn AnyCache> {
        Box::new(Self::new(rows))
    }
}

/// [`CacheOf`] any backend: [`RowCaches`] without its type.
trait AnyCache: Any + Debug + Send + Sync {
    fn as_any_mut(&mut self) -> &mut dyn Any;
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
    fn copy(&self) -> Box<dyn AnyCache>;
    fn rows(&self) -> usize;
    fn len(&self, row: usize) -> usize;
    fn take(&mut self, row: usize) -> Box<dyn AnyCache>;
    fn truncate(&mut self, row: usize, tokens: usize);
    /// Appends the rows of a cache of the same backend; false if it is of another one.
    fn append(&mut self, other: Box<dyn AnyCache>) -> bool;
    fn into_rows(self: Box<Self>) -> Vec<Box<dyn AnyCache>>;
}

impl<B: Backend> AnyCache for CacheOf<B> {
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }

    fn copy(&self) -> Box<dyn AnyCache> {
        Self::boxed(self.rows.clone())
    }

    fn rows(&self) -> usize {
        self.rows.rows()
    }

    fn len(&self, row: usize) -> usize {
        self.rows.len(row)
    }

    fn take(&mut self, row: usize) -> Box<dyn AnyCache> {
        Self::boxed(self.rows.take(row))
    }

    fn truncate(&mut self, row: usize, tokens: usize) {
        self.rows.truncate(row, tokens);
    }

    fn append(&mut self, other: Box<dyn AnyCache>) -> bool {
        match other.into_any().downcast::<Self>() {
            Ok(other) => {
                self.rows.append(other.rows);
                true
            }
            Err(_) => false,
        }
    }

    fn into_rows(self: Box<Self>) -> Vec<Box<dyn AnyCache>> {
        self.rows.into_rows().into_iter().map(Self::boxed).collect()
    }
}

fn mismatch(found: BackendKind, needed: BackendKind) -> Error {
    Error::Msg(format!("the cache was made for backend {found}, needed one for {needed}"))
}

impl KvCache {
    /// An empty exact cache for `rows` rows that `decoder` reads.
    pub fn new(decoder: &Decoder, rows: usize) -> Self {
        Self::with_type(decoder, rows, CacheType::F32)
    }

    /// An empty cache for `rows` rows that `decoder` reads, where its backend computes.
    pub fn with_type(decoder: &Decoder, rows: usize, kind: CacheType) -> Self {
        let (config, backend) = (&decoder.config, decoder.compute.backend);
        let rows = with_backend!(backend, B => CacheOf::<B>::boxed(B::cache(config, rows, kind)));
        let longrope_threshold = config.long_inv_freq().map(|(original, _)| original);
        Self { rows, backend, longrope_threshold }
    }

    /// Whether a row of `from` tokens and one of `to` rotate alike, so that what is kept of the one can
    /// be of use to the other.
    pub fn same_rope_scaling(&self, from: usize, to: usize) -> bool {
        self.longrope_threshold.is_none_or(|most| (from > most) == (to > most))
    }

    /// Whether a backend reads its rows.
    pub(super) fn is_of(&self, backend: BackendKind) -> bool {
        self.backend == backend
    }

    /// The cache as its backend has it.
    ///
    /// # Errors
    /// If it is of another backend.
    pub(super) fn of<B: Backend>(&mut self) -> Result<&mut CacheOf<B>> {
        let (found, cache) = (self.backend, self.rows.as_any_mut().downcast_mut());
        cache.ok_or_else(|| mismatch(found, B::KIND))
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows.rows()
    }

    /// The number of tokens that a row has.
    pub fn len(&self, row: usize) -> usize {
        self.rows.len(row)
    }

    /// Whether no row has a token.
    pub fn is_empty(&self) -> bool {
        (0..self.rows()).all(|row| self.len(row) == 0)
    }

    /// Removes a row and returns it as a cache of its own; those behind it move up.
    pub fn take(&mut self, row: usize) -> Self {
        let rows = self.rows.take(row);
        Self { rows, backend: self.backend, longrope_threshold: self.longrope_threshold }
    }

    /// Forgets all of a row's tokens but the first `tokens`.
    pub fn truncate(&mut self, row: usize, tokens: usize) {
        self.rows.truncate(row, tokens);
    }

    /// Appends the rows of another cache of the same decoder and type.
    ///
    /// # Errors
    /// If it is of another backend.
    pub fn append(&mut self, other: Self) -> Result<()> {
        match self.rows.append(other.rows) {
            true => Ok(()),
            false => Err(mismatch(other.backend, self.backend)),
        }
    }

    /// Each row as a cache of its own.
    pub fn into_rows(self) -> Vec<Self> {
        let Self { rows, backend, longrope_threshold } = self;
        let rows = rows.into_rows().into_iter();
        rows.map(|rows| Self { rows, backend, longrope_threshold }).collect()
    }
}

impl Clone for KvCache {
    fn clone(&self) -> Self {
        let rows = self.rows.copy();
        Self { rows, backend: self.backend, longrope_threshold: self.longrope_threshold }
    }
}
