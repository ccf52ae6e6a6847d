//! Tokens from a decoder: sampling, batched decoding over a cache, stop strings.
//!
//! A row's tokens depend on its prompt, its key and the settings, never on its place in the batch
//! or on its neighbours. Works in token ids; text comes in only where stop strings are looked for.

pub mod decode;
pub mod sampling;
pub mod stop;

pub use decode::{
    Finish, GenerateError, Generated, Generation, Request, Settings, Usage, generate,
};
pub use sampling::{LogProbs, Sampling, SamplingError, log_probs_top_k};
pub use stop::StopStrings;
