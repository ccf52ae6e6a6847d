//! Rollouts for reinforcement learning: from prompts to responses, rewards and advantages.
//!
//! The policy generates responses ([`respond`]). A reward source gives each response a number or no
//! opinion: a rule ([`Rule`]), an external program ([`RewardCommand`]), a separate reward model
//! ([`RewardModel`]) or an adapter on the base model. [`Rewards`] is their weighted sum, and a [`Scorer`]
//! runs all of them. [`ppo`] computes advantages, `diagnose` checks the health of an update, and samples
//! of responses with their rewards are logged to a file and printed to the terminal (`SampleLog`,
//! `table`).
//!
//! Everything is a function of the policy, the prompts and a key, so that an update that was lost is
//! repeated to the same bytes. This module does not know how the policy is trained.

mod command;
pub(crate) mod diagnose;
pub mod ppo;
pub mod respond;
pub(crate) mod reward_model;
mod rewards;
mod rule;
mod samples;
mod scorer;

pub use command::RewardCommand;
pub use diagnose::{Cause, Diagnosis, FirstStep, diagnose_update};
pub use ppo::{AdvantageSettings, Experience};
pub use respond::Response;
pub use reward_model::{RewardModel, RewardModelError};
pub use rewards::{RewardError, RewardScores, RewardSource, Rewards, Sample};
pub use rule::{Rule, RuleError, Unit};
pub(crate) use samples::{SampleLog, table};
pub use samples::{SampleRow, SamplesError};
pub use scorer::{Answer, ScoreError, Scorer};
