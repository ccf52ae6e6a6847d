//! Prompts to responses to rewards to advantages: what reinforcement learning learns from.
//!
//! Everything is a function of the policy, the prompts and a key, so that an update that was lost is
//! made again to the same bytes. This room does not know how the policy is changed.

pub mod diagnose;
pub mod ppo;
pub mod respond;

pub use diagnose::{Diagnosis, Evidence, diagnose};
pub use ppo::{AdvantageSettings, Experience};
pub use respond::Response;
