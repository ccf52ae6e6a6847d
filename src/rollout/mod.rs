//! Rewards of replies, and what people see of them.
//!
//! A reward is a number for a reply to a row of the data, or no opinion. It comes from a rule that
//! needs no model ([`Rule`]), from a program ([`RewardCommand`]), or from a reward model that the
//! caller runs; several are weighed and summed ([`Rewards`]). Samples of what was said and what it
//! earned go to a file and to the terminal ([`SampleLog`], [`table`]).
//!
//! This room does not know that there is a model or an optimizer.

pub mod command;
pub mod rewards;
pub mod rule;
pub mod samples;

pub use command::RewardCommand;
pub use rewards::{RewardError, RewardMean, RewardSource, Rewards, Sample, Scores};
pub use rule::{Rule, RuleError, Unit};
pub use samples::{SampleLog, SampleRow, SamplesError, table};
