//! Prompts to responses to rewards to advantages: what reinforcement learning learns from.
//!
//! Responses come from the policy ([`respond`]). A reward is a number for one of them, or no
//! opinion: from a rule that needs no model ([`Rule`]), from a program ([`RewardCommand`]), from a
//! model of its own ([`RewardModel`]) or an adapter on the base; several are weighed and summed
//! ([`Rewards`]), all of it by one [`Scorer`]. [`ppo`] makes advantages of them, [`diagnose`] looks whether all is well, and
//! samples of what was said and what it earned go to a file and to the terminal ([`SampleLog`],
//! [`table`]).
//!
//! Everything is a function of the policy, the prompts and a key, so that an update that was lost is
//! made again to the same bytes. This room does not know how the policy is changed.

pub mod command;
pub mod diagnose;
pub mod ppo;
pub mod respond;
pub mod reward_model;
pub mod rewards;
pub mod rule;
pub mod samples;
pub mod scorer;

pub use command::RewardCommand;
pub use diagnose::{Cause, Diagnosis, FirstStep, diagnose_update};
pub use ppo::{AdvantageSettings, Experience};
pub use respond::Response;
pub use reward_model::{RewardModel, RewardModelError};
pub use rewards::{RewardError, RewardScores, RewardSource, Rewards, Sample};
pub use rule::{Rule, RuleError, Unit};
pub use samples::{SampleLog, SampleRow, SamplesError, table};
pub use scorer::{Answer, ScoreError, Scorer};
