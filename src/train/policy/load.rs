//! The inputs of a reinforcement learning run: prompts, reward sources and the reference.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::{EpochSampler, PolicyTask, Rollouts, Times};
use crate::data::{Dataset, LoadSettings, PromptSettings, Prompts};
use crate::model::{ActiveAdapter, Decoder};
use crate::monitor::Monitor;
use crate::quant::Bytes;
use crate::rollout::{RewardCommand, RewardModel, RewardSource, Rewards, Scorer};
use crate::text::{Tokenizer, first_second};
use crate::train::TrainError;
use crate::train::fingerprints::base_fingerprint;
use crate::train::lora::read_scoring;
use crate::train::reference;
use crate::train::rows::{report_checks, row_cache, warn_nothing_held_out};
use crate::train::run_dir::{Fingerprint, read_accuracy};
use crate::train::settings::{CommonSettings, GrpoSettings, PpoSettings};

/// Loads the inputs of a run.
struct RolloutLoader<'a> {
    common: &'a CommonSettings,
    decoder: &'a Decoder,
    tokenizer: &'a Tokenizer,
    monitor: Monitor<'a>,
    /// Maximum number of tokens of a prompt and its response together.
    max_length: usize,
    fingerprints: Vec<Fingerprint>,
}

/// The prompts of a run.
struct LoadedPrompts {
    train: Prompts,
    held_out: Option<Prompts>,
    held_out_lines: Option<Bytes>,
}

/// Reward sources, and inputs of only one of the algorithms.
struct LoadedRewards {
    rewards: Rewards,
    adapter: Option<ActiveAdapter>,
    model: Option<RewardModel>,
    judge: Option<ActiveAdapter>,
    ptx: Option<(Dataset, EpochSampler)>,
}

impl Rollouts {
    /// Loads the prompts and reward sources, for a policy on top of `frozen`.
    pub(crate) fn load(
        common: &CommonSettings,
        task: PolicyTask,
        decoder: &Decoder,
        frozen: &[ActiveAdapter],
        tokenizer: Tokenizer,
        monitor: Monitor<'_>,
    ) -> Result<Self, TrainError> {
        let max_length = max_length(common, decoder, &tokenizer, task.response_length())?;
        let mut loader = RolloutLoader {
            common,
            decoder,
            tokenizer: &tokenizer,
            monitor,
            max_length,
            fingerprints: Vec::new(),
        };
        let prompts = loader.prompts(task.response_length())?;
        let found = match &task {
            PolicyTask::Ppo(own) => loader.ppo_rewards(own)?,
            PolicyTask::Grpo(own) => loader.grpo_rewards(own)?,
        };
        let LoadedRewards { rewards, adapter, model, judge, ptx } = found;
        loader.check_prompts(&prompts, &rewards, model.as_ref(), task.response_length())?;
        let reference = loader.reference(&task, frozen)?;
        let fingerprints = loader.fingerprints;
        let chats = prompts.train.report.conversations > 0;
        let scorer = Scorer {
            rewards,
            adapter,
            model,
            eos: tokenizer.eos().filter(|_| task.score_at_eos()),
            after: if chats { tokenizer.after_turn()? } else { Vec::new() },
        };
        let LoadedPrompts { train, held_out, held_out_lines } = prompts;
        let count = train.rows.len();
        Ok(Self {
            task,
            common: common.clone(),
            tokenizer,
            compute: decoder.compute,
            prompt_sampler: EpochSampler::new("prompts", common.seed, !common.no_shuffle, count),
            prompts: train,
            held_out,
            held_out_lines,
            ptx,
            reference,
            scorer,
            judge,
            samples: None,
            times: Times::default(),
            fingerprints,
        })
    }
}

/// Maximum number of tokens of a prompt and its response together.
fn max_length(
    common: &CommonSettings,
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    response_length: usize,
) -> Result<usize, TrainError> {
    // A reward model also reads the end-of-turn token after the response, in the same window.
    let ending = 1 + tokenizer.after_turn().map_or(0, |after| after.len());
    let window = decoder.config.max_position_embeddings.saturating_sub(ending);
    let most = common.max_length.min(window);
    if response_length < most {
        return Ok(most);
    }
    Err(TrainError::Settings(format!(
        "responses may have {response_length} tokens and prompt and response together {most} \
         (max_length or the model's window): no room is left for a prompt"
    )))
}

impl RolloutLoader<'_> {
    fn prompts(&self, response_length: usize) -> Result<LoadedPrompts, TrainError> {
        let common = self.common;
        let reading = PromptSettings {
            max_length: self.max_length - response_length,
            allow: common.allow.clone(),
            cache: Some(row_cache(common)),
        };
        let load = |path: &Path| Prompts::load(path, self.tokenizer, reading.clone(), self.monitor);
        let path = common.data_file();
        let prompts = if !common.evaluates() {
            LoadedPrompts { train: load(path)?, held_out: None, held_out_lines: None }
        } else if !common.eval_data.as_os_str().is_empty() {
            let (train, held_out) = (load(path)?, Some(load(&common.eval_data)?));
            LoadedPrompts { train, held_out, held_out_lines: None }
        } else {
            let split = Prompts::load_split(path, self.tokenizer, reading.clone(), self.monitor)?;
            let held_out_lines = split.held_out.is_some().then_some(split.held_out_lines);
            if held_out_lines.is_none() {
                warn_nothing_held_out(common, self.monitor);
            }
            LoadedPrompts { train: split.train, held_out: split.held_out, held_out_lines }
        };
        report_checks(&prompts.train.checks, path, &common.allow, self.monitor)?;
        self.monitor.note(format_args!("data: {}", prompts.train.report));
        Ok(prompts)
    }

    fn ppo_rewards(&mut self, own: &PpoSettings) -> Result<LoadedRewards, TrainError> {
        let adapter = self.scoring(&own.reward_adapter, own.min_reward_accuracy)?;
        let mut judge = None;
        if !own.judge_adapter.as_os_str().is_empty() {
            judge = Some(self.scoring(&own.judge_adapter, 0.0)?);
        }
        let ptx = if own.ptx_data.as_os_str().is_empty() { None } else { Some(self.ptx(own)?) };
        let source = RewardSource::Model { name: "reward_adapter".into() };
        let rewards = Rewards::new(vec![source], None)?;
        Ok(LoadedRewards { rewards, adapter: Some(adapter), model: None, judge, ptx })
    }

    /// Text rows of PPO-ptx.
    fn ptx(&mut self, own: &PpoSettings) -> Result<(Dataset, EpochSampler), TrainError> {
        let common = self.common;
        let cache = Some(row_cache(common));
        let reading = LoadSettings { cache, ..LoadSettings::from(self.max_length) };
        let data = Dataset::load(&own.ptx_data, self.tokenizer, reading, self.monitor)?;
        report_checks(&data.checks, &own.ptx_data, &common.allow, self.monitor)?;
        self.fingerprints.push(("the ptx data".into(), data.sha256.clone()));
        let sampler = EpochSampler::new("ptx", common.seed, true, data.rows.len());
        Ok((data, sampler))
    }

    fn grpo_rewards(&mut self, own: &GrpoSettings) -> Result<LoadedRewards, TrainError> {
        let (mut sources, mut adapter, mut model) = (Vec::new(), None, None);
        for spec in &own.reward {
            let source = RewardSource::rule(&spec.to_string());
            sources.push(source.map_err(|e| TrainError::Settings(e.to_string()))?);
        }
        for command in &own.reward_command {
            let timeout = Duration::from_secs_f64(own.reward_timeout);
            sources.push(RewardSource::Command(RewardCommand::start(command, timeout)?));
        }
        if !own.reward_adapter.as_os_str().is_empty() {
            adapter = Some(self.scoring(&own.reward_adapter, own.min_reward_accuracy)?);
            sources.push(RewardSource::Model { name: "reward_adapter".into() });
        }
        if !own.reward_model.as_os_str().is_empty() {
            let now = first_second(&self.common.template_date);
            model = Some(RewardModel::load(&own.reward_model, self.decoder, now)?);
            sources.push(RewardSource::Model { name: "reward_model".into() });
        }
        let weights = &own.reward_weights;
        let weights = (!weights.is_empty()).then(|| weights.clone());
        let rewards = Rewards::new(sources, weights)?;
        Ok(LoadedRewards { rewards, adapter, model, judge: None, ptx: None })
    }

    /// Loads an adapter with a score head.
    fn scoring(&self, folder: &Path, min_accuracy: f64) -> Result<ActiveAdapter, TrainError> {
        check_reward_accuracy(folder, min_accuracy, self.monitor)?;
        Ok(ActiveAdapter::frozen(Arc::new(read_scoring(folder, self.decoder, self.monitor)?)))
    }

    /// Checks that the reward sources can read every prompt.
    fn check_prompts(
        &self,
        prompts: &LoadedPrompts,
        rewards: &Rewards,
        model: Option<&RewardModel>,
        response_length: usize,
    ) -> Result<(), TrainError> {
        let common = self.common;
        let given = !common.eval_data.as_os_str().is_empty();
        let held_out_file = if given { &*common.eval_data } else { common.data_file() };
        let held_out = (held_out_file, prompts.held_out.as_ref());
        let files = [(common.data_file(), Some(&prompts.train)), held_out];
        for (path, prompts) in files {
            for prompt in prompts.iter().flat_map(|prompts| prompts.rows.iter()) {
                rewards.check(&prompt.row).map_err(|e| {
                    let (path, line) = (path.display(), prompt.line);
                    TrainError::Settings(format!("{path}:{line}: {e}"))
                })?;
            }
        }
        match model {
            Some(model) => check_window(model, &files, response_length),
            None => Ok(()),
        }
    }

    /// The adapters of the reference, if the algorithm has one.
    fn reference(
        &mut self,
        task: &PolicyTask,
        frozen: &[ActiveAdapter],
    ) -> Result<Option<Vec<ActiveAdapter>>, TrainError> {
        if !task.has_reference() {
            return Ok(None);
        }
        let given = !task.ref_adapter().as_os_str().is_empty();
        let folder = if given { task.ref_adapter() } else { &self.common.adapter };
        if !given && !folder.as_os_str().is_empty() {
            let fingerprint = base_fingerprint(folder)?;
            self.fingerprints.push(("the reference adapter".to_string(), fingerprint));
        }
        reference::active(frozen, folder, self.decoder, self.monitor).map(Some)
    }
}

/// Checks the accuracy of a reward model on held-out pairs, recorded by its training.
fn check_reward_accuracy(
    folder: &Path,
    min_accuracy: f64,
    monitor: Monitor<'_>,
) -> Result<(), TrainError> {
    match read_accuracy(folder)? {
        Some(accuracy) if accuracy < min_accuracy => Err(TrainError::Settings(format!(
            "--reward-adapter {}: accuracy on held-out pairs is {:.1} %, needed {:.1} % \
             (min_reward_accuracy): a policy would overfit to its errors",
            folder.display(),
            accuracy * 100.0,
            min_accuracy * 100.0
        ))),
        Some(_) => Ok(()),
        None if min_accuracy > 0.0 => {
            monitor.warn(format_args!(
                "{0}: its accuracy on held-out pairs is not known (measure it with: \
                 quantune eval --base BASE --reward {0} --data PAIRS)",
                folder.display()
            ));
            Ok(())
        }
        None => Ok(()),
    }
}

/// Checks that the longest prompt and a response of `response_length` tokens fit into the context window of
/// a reward model with its own base.
fn check_window(
    model: &RewardModel,
    files: &[(&Path, Option<&Prompts>)],
    response_length: usize,
) -> Result<(), TrainError> {
    let mut longest = (0, String::new());
    for (path, prompts) in files {
        for prompt in prompts.iter().flat_map(|prompts| prompts.rows.iter()) {
            let tokens = model.prompt_tokens(&prompt)?;
            if tokens > longest.0 {
                longest = (tokens, format!("{}:{}", path.display(), prompt.line));
            }
        }
    }
    let (window, (tokens, place)) = (model.window(), longest);
    if tokens + response_length <= window {
        return Ok(());
    }
    Err(TrainError::Settings(format!(
        "{place}: the longest prompt has {tokens} tokens for the reward model and its response may \
         have {response_length}, needed {window} together at most: reward_model's window"
    )))
}
