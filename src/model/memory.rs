//! The memory that models work with, by their backend.

use super::backend::{Backend, HeadBytes, LayerBytes, with_backend};
use super::cache::CacheType;
use super::decoder::Decoder;
use super::full::FullModel;
use super::layer::AdapterSizes;

impl Decoder {
    /// The memory that its layers work with in a batch of `tokens` tokens.
    pub fn layer_bytes(&self, tokens: usize, sizes: &AdapterSizes) -> LayerBytes {
        with_backend!(self.compute.backend, B => B::layer_bytes(self, tokens, sizes))
    }

    /// The memory that reading `rows` rows works with, at a head of `vocabulary` outputs.
    pub fn head_bytes(&self, rows: usize, vocabulary: usize) -> HeadBytes {
        with_backend!(self.compute.backend, B => B::head_bytes(self, rows, vocabulary))
    }

    /// Bytes of the keys and values of `tokens` tokens.
    pub fn cache_bytes(&self, tokens: usize, kind: CacheType) -> usize {
        with_backend!(self.compute.backend, B => B::cache_bytes(&self.config, tokens, kind))
    }

    /// Bytes of `count` numbers that train: values, gradients and the optimizer's state.
    pub fn parameter_bytes(&self, count: usize) -> usize {
        with_backend!(self.compute.backend, B => B::parameter_bytes(count))
    }
}

impl FullModel {
    /// Bytes of its parameters, their gradients and the optimizer's state.
    pub fn parameter_bytes(&self) -> usize {
        with_backend!(self.compute.backend, B => B::parameter_bytes(self.parameter_count()))
    }

    /// Bytes that a micro-batch of `tokens` tokens works with where the uppermost `kept_layers` keep
    /// their tapes, beside [`Self::parameter_bytes`].
    pub fn training_bytes(&self, tokens: usize, kept_layers: usize) -> usize {
        with_backend!(self.compute.backend, B => B::full_training_bytes(self, tokens, kept_layers))
    }
}
