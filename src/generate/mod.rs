//! Text generation: sampling, a continuous-batching engine, and stop strings.
//!
//! A row's tokens depend on its prompt, its key and the settings, never on its place in the batch
//! or on its neighbours. Works in token ids; text comes in only where stop strings are looked for.

pub mod decode;
pub mod engine;
pub mod sampling;
pub mod stop;

pub use decode::{Generation, Request, Settings, generate};
pub use engine::{Engine, Event, Finish, GenerateError, Generated, Job, JobOutput, Prefix, Usage};
pub use sampling::{LogProbs, Sampling, SamplingError, log_probs_top_k};
pub use stop::StopStrings;
