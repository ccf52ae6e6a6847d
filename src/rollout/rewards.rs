//! Reward sources and their weighted sum.

use serde_json::{Map, Value};

use super::{RewardCommand, Rule, RuleError};

/// A response to be scored.
#[derive(Debug, Clone, Copy)]
pub struct Sample<'a> {
    /// Text of the prompt.
    pub prompt: &'a str,
    /// Text of the response, without the end-of-sequence token.
    pub completion: &'a str,
    /// Number of tokens, without the end-of-sequence token.
    pub tokens: usize,
    /// Whether the response ended by itself, not at the length limit.
    pub finished: bool,
    /// The data row of the prompt.
    pub row: &'a Map<String, Value>,
}

/// A source of rewards.
#[derive(Debug)]
pub enum RewardSource {
    /// A rule.
    Rule {
        /// Its specification on the command line.
        spec: String,
        /// The parsed rule.
        rule: Rule,
    },
    /// An external program.
    Command(RewardCommand),
    /// A reward model, run by the caller.
    Model {
        /// Its name in metrics.
        name: String,
    },
}

impl RewardSource {
    /// Parses a rule from its specification on the command line.
    pub fn rule(spec: &str) -> Result<Self, RuleError> {
        Ok(Self::Rule { spec: spec.into(), rule: Rule::parse(spec)? })
    }

    /// Its name in metrics.
    pub fn name(&self) -> &str {
        match self {
            Self::Rule { spec, .. } => spec,
            Self::Command(command) => command.command(),
            Self::Model { name } => name,
        }
    }
}

/// Why responses cannot be scored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RewardError {
    /// No reward source.
    #[error("no reward, needed a rule, a command or a reward model")]
    NoSource,
    /// The number of weights differs from that of the sources.
    #[error("{found} reward weights for {rewards} rewards ({names}), needed one per reward")]
    Weights {
        /// Number of weights.
        found: usize,
        /// Number of sources.
        rewards: usize,
        /// Names of the sources.
        names: String,
    },
    /// A weight that is not finite.
    #[error("reward weight {index} is {found}, needed a finite number")]
    Weight {
        /// Index of the weight, from 0.
        index: usize,
        /// The weight.
        found: f64,
    },
    /// A rule cannot be applied to a row.
    #[error("reward {name:?}, sample {sample}: {source}")]
    Rule {
        /// The rule.
        name: String,
        /// Index of the sample in the batch, from 0.
        sample: usize,
        /// The error.
        source: RuleError,
    },
    /// The reward program failed.
    #[error("reward command {command:?} {fault}")]
    Command {
        /// The program.
        command: String,
        /// What it did, and what is needed.
        fault: String,
    },
    /// A reward that is not finite.
    #[error("reward {name:?} of sample {sample} is {found}, needed a finite number")]
    NotFinite {
        /// The source.
        name: String,
        /// Index of the sample in the batch, from 0.
        sample: usize,
        /// The reward.
        found: f64,
    },
}

/// Reward sources with weights.
#[derive(Debug)]
pub struct Rewards {
    sources: Vec<RewardSource>,
    weights: Vec<f64>,
}

/// The rewards of a batch of samples.
#[derive(Debug, Clone, PartialEq)]
pub struct RewardScores {
    /// For each source the rewards of all samples; `None` where it has no opinion.
    pub columns: Vec<Vec<Option<f64>>>,
    /// For each sample the weighted sum of its rewards; `None` if no source has an opinion.
    pub totals: Vec<Option<f64>>,
}

impl Rewards {
    /// Reward sources with weights; without `weights` each has weight 1, as in TRL.
    pub fn new(sources: Vec<RewardSource>, weights: Option<Vec<f64>>) -> Result<Self, RewardError> {
        if sources.is_empty() {
            return Err(RewardError::NoSource);
        }
        let weights = weights.unwrap_or_else(|| vec![1.0; sources.len()]);
        if weights.len() != sources.len() {
            let names: Vec<&str> = sources.iter().map(RewardSource::name).collect();
            return Err(RewardError::Weights {
                found: weights.len(),
                rewards: sources.len(),
                names: names.join(", "),
            });
        }
        if let Some(index) = weights.iter().position(|weight| !weight.is_finite()) {
            return Err(RewardError::Weight { index, found: weights[index] });
        }
        Ok(Self { sources, weights })
    }

    /// The reward sources, in the order of the weights.
    pub fn sources(&self) -> &[RewardSource] {
        &self.sources
    }

    /// Checks that all rules can be applied to a data row. A run does so before the first step.
    pub fn check(&self, row: &Map<String, Value>) -> Result<(), RuleError> {
        self.sources.iter().try_for_each(|source| match source {
            RewardSource::Rule { rule, .. } => rule.check(row),
            RewardSource::Command(_) | RewardSource::Model { .. } => Ok(()),
        })
    }

    /// Scores samples. `models` are the scores of each [`RewardSource::Model`], in order, one per sample.
    ///
    /// # Panics
    /// If the number of models or scores differs.
    pub fn score(
        &mut self,
        samples: &[Sample],
        models: &[Vec<f64>],
    ) -> Result<RewardScores, RewardError> {
        let mut models = models.iter();
        let mut columns = Vec::with_capacity(self.sources.len());
        for source in &mut self.sources {
            let column: Vec<Option<f64>> = match source {
                RewardSource::Rule { spec, rule } => {
                    let judge = |(sample, scored): (usize, &Sample)| match rule.score(scored) {
                        Ok(reward) => Ok(Some(reward)),
                        Err(source) => {
                            Err(RewardError::Rule { name: spec.clone(), sample, source })
                        }
                    };
                    samples.iter().enumerate().map(judge).collect::<Result<_, _>>()?
                }
                RewardSource::Command(command) => command.score(samples)?,
                RewardSource::Model { .. } => {
                    let scores = models.next().expect("scores for every reward model");
                    assert_eq!(scores.len(), samples.len());
                    scores.iter().copied().map(Some).collect()
                }
            };
            if let Some(sample) = column.iter().position(|r| r.is_some_and(|r| !r.is_finite())) {
                let found = column[sample].unwrap_or(f64::NAN);
                return Err(RewardError::NotFinite { name: source.name().into(), sample, found });
            }
            columns.push(column);
        }
        assert!(models.next().is_none(), "more scores than reward models");
        let total = |sample: usize| {
            let opinions = columns.iter().zip(&self.weights);
            let weighted = opinions.filter_map(|(column, weight)| Some(column[sample]? * weight));
            weighted.reduce(|a, b| a + b)
        };
        let totals = (0..samples.len()).map(total).collect();
        Ok(RewardScores { columns, totals })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::Duration;

    fn sample<'a>(completion: &'a str, row: &'a Value) -> Sample<'a> {
        let row = row.as_object().unwrap();
        let tokens = completion.split_whitespace().count();
        Sample { prompt: "p", completion, tokens, finished: true, row }
    }

    fn model(name: &str) -> RewardSource {
        RewardSource::Model { name: name.into() }
    }

    #[test]
    fn totals_are_weighted_sums() {
        let rules = ["exact:answer", "length:2-2"].map(|spec| RewardSource::rule(spec).unwrap());
        let sources = rules.into_iter().chain([model("rm")]).collect();
        let mut rewards = Rewards::new(sources, Some(vec![1.0, -0.5, 2.0])).unwrap();
        let row = json!({ "answer": "a b" });
        rewards.check(row.as_object().unwrap()).unwrap();
        let samples = [sample("a b", &row), sample("a", &row)];
        let scores = rewards.score(&samples, &[vec![0.25, -3.0]]).unwrap();
        assert_eq!(scores.columns[1], [Some(1.0), Some(0.5)]);
        assert_eq!(scores.totals, [Some(1.0 - 0.5 + 0.5), Some(-0.25 - 6.0)]);
    }

    #[test]
    fn no_opinion_is_not_zero() {
        let program = |lines: &str| {
            let command =
                format!("while read -r l; do printf '{lines}'; read -r l; read -r l; done");
            RewardSource::Command(RewardCommand::start(&command, Duration::from_secs(20)).unwrap())
        };
        let sources = vec![program("1\\nnull\\nnull\\n"), program("2\\n4\\nnull\\n")];
        let row = json!({});
        let samples = ["a", "b", "c"].map(|text| sample(text, &row));
        let mut rewards = Rewards::new(sources, Some(vec![10.0, 1.0])).unwrap();
        let scores = rewards.score(&samples, &[]).unwrap();
        assert_eq!(scores.columns[0], [Some(1.0), None, None]);
        assert_eq!(scores.totals, [Some(12.0), Some(4.0), None]);
    }

    #[test]
    fn errors_name_the_reward_source() {
        let error = Rewards::new(Vec::new(), None).unwrap_err();
        assert_eq!(error.to_string(), "no reward, needed a rule, a command or a reward model");
        let error = Rewards::new(vec![model("a"), model("b")], Some(vec![1.0])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "1 reward weights for 2 rewards (a, b), needed one per reward"
        );
        let error = Rewards::new(vec![model("a")], Some(vec![f64::NAN])).unwrap_err();
        assert_eq!(error.to_string(), "reward weight 0 is NaN, needed a finite number");

        let row = json!({ "prompt": "p" });
        let mut rewards = Rewards::new(vec![model("rm")], None).unwrap();
        let error = rewards.score(&[sample("x", &row)], &[vec![f64::NAN]]).unwrap_err();
        assert_eq!(error.to_string(), "reward \"rm\" of sample 0 is NaN, needed a finite number");
        let rule = RewardSource::rule("exact:answer").unwrap();
        let error = Rewards::new(vec![rule], None).unwrap().score(&[sample("x", &row)], &[]);
        assert_eq!(
            error.unwrap_err().to_string(),
            "reward \"exact:answer\", sample 0: the row has no field \"answer\" to compare the \
             reply with; it has [\"prompt\"]"
        );
    }
}
