//! The adapter of a run: a new one, or one that is loaded from a folder.

use std::path::Path;
use std::sync::Arc;

use quantune_adapters::base::BaseRows;
use quantune_adapters::config::{EMBEDDING, HEAD, InitLoraWeights, LoraConfig, Modules};
use quantune_adapters::delta::Adapter;
use quantune_adapters::initialize::{self, BaseWeights};
use quantune_adapters::targets::resolve;

use super::TrainError;
use super::settings::{AdapterPath, CommonSettings};
use crate::model::adapter_files::open_adapter;
use crate::model::{ActiveAdapter, Decoder};
use crate::monitor::Monitor;
use crate::ops::Compute;
use crate::weights::Checkpoint;

/// The adapter before the first step: a new one, or `settings.adapter`. `added` are the tokens that
/// were added to the vocabulary for this run.
pub(super) fn begin_adapter(
    settings: &CommonSettings,
    decoder: &Decoder,
    added: &[u32],
    monitor: Monitor<'_>,
) -> Result<Adapter, TrainError> {
    if !settings.adapter.as_os_str().is_empty() {
        if !added.is_empty() {
            let path = settings.adapter.display();
            return Err(TrainError::Settings(format!(
                "add_tokens and add_special_tokens name {} tokens that the adapter {path} has no rows \
                 for, needed a fresh adapter: without --adapter, or with --frozen-adapter",
                added.len()
            )));
        }
        let mut adapter = read_adapter(&settings.adapter, decoder, monitor)?;
        adapter.config.lora_dropout = settings.lora_dropout;
        return Ok(adapter);
    }
    let mut config = lora_config(settings)?;
    train_rows(&mut config, decoder, added)?;
    let original = match settings.loftq_base.as_os_str().is_empty() {
        true => None,
        false => Some(Decoder::load(&Checkpoint::open(&settings.loftq_base)?, Compute::F32)?),
    };
    let weights = |decoder: &Decoder, module: &str| -> Option<Box<dyn BaseRows>> {
        decoder.linear_weight(module).map(|weight| Box::new(weight) as Box<dyn BaseRows>)
    };
    let base = |module: &str| weights(decoder, module);
    let of_original = |module: &str| original.as_ref().and_then(|of| weights(of, module));
    let bases =
        BaseWeights { base: &base, original: original.is_some().then_some(&of_original as _) };
    let (linears, seed) = (decoder.linears(), settings.seed);
    let (adapter, unmatched) =
        initialize::begin("default", config, &linears, Some(HEAD), bases, seed)?;
    for unmatched in &unmatched {
        monitor.warn(unmatched);
    }
    Ok(adapter)
}

/// Makes the rows of added tokens trainable, unless embedding and lm_head are trained as a whole or have an
/// update; a tied lm_head shares the rows of the embedding.
fn train_rows(config: &mut LoraConfig, decoder: &Decoder, added: &[u32]) -> Result<(), TrainError> {
    if added.is_empty() {
        return Ok(());
    }
    let trains: Vec<String> = {
        let resolved = resolve(config, &decoder.linears(), Some(HEAD))?;
        let targets = resolved.targets.into_iter().map(|target| target.spec.name);
        targets.chain(config.saved_modules().map(String::from)).collect()
    };
    let trains = |module: &str| trains.iter().any(|name| name == module);
    if !trains(EMBEDDING) {
        let known = &mut config.trainable_token_indices;
        let new = added.iter().filter(|token| !known.contains(token)).copied();
        let new: Vec<u32> = new.collect();
        known.extend(new);
    }
    if !decoder.config.tie_word_embeddings && !trains(HEAD) {
        config.head_token_indices = added.to_vec();
    }
    Ok(())
}

/// The adapter of a checkpoint of a run with these settings. Its initialization is not
/// repeated: its frozen ranks are read from the checkpoint.
pub(super) fn resume_adapter(
    folder: &Path,
    settings: &CommonSettings,
    decoder: &Decoder,
    monitor: Monitor<'_>,
) -> Result<Adapter, TrainError> {
    let mut adapter = read_adapter(folder, decoder, monitor)?;
    if settings.adapter.as_os_str().is_empty() {
        adapter.freeze_ranks(&init_lora_weights(settings)?);
    }
    Ok(adapter)
}

/// Loads an adapter for this base, from a PEFT folder or a GGUF LoRA.
pub(super) fn read_adapter(
    path: &Path,
    decoder: &Decoder,
    monitor: Monitor<'_>,
) -> Result<Adapter, TrainError> {
    let (adapter, unmatched) = open_adapter(path, "default", decoder)?;
    for unmatched in unmatched {
        monitor.warn(format_args!("{}: {unmatched}", path.display()));
    }
    Ok(adapter)
}

/// Loads the frozen adapters below the trained one.
pub(super) fn read_frozen(
    settings: &CommonSettings,
    decoder: &Decoder,
    monitor: Monitor<'_>,
) -> Result<Vec<ActiveAdapter>, TrainError> {
    let read = |at: &AdapterPath| {
        let adapter = read_adapter(&at.path, decoder, monitor)?;
        if adapter.score.is_some() {
            let fault = "a reward model, needed an adapter that generates";
            return Err(TrainError::Settings(format!("--frozen-adapter {at}: {fault}")));
        }
        Ok(ActiveAdapter { adapter: Arc::new(adapter), weight: at.weight, trainable: false })
    };
    settings.frozen_adapter.iter().map(read).collect()
}

/// Loads an adapter, which must have a score head for this base.
pub fn read_scoring(
    folder: &Path,
    decoder: &Decoder,
    monitor: Monitor<'_>,
) -> Result<Adapter, TrainError> {
    let adapter = read_adapter(folder, decoder, monitor)?;
    let hidden_size = decoder.config.hidden_size;
    match adapter.score.as_ref().map(|score| score.dims()[1]) {
        Some(width) if width == hidden_size => Ok(adapter),
        Some(width) => Err(TrainError::Settings(format!(
            "{}: the score head reads {width} numbers, this base has {hidden_size}",
            folder.display()
        ))),
        None => Err(TrainError::Settings(format!(
            "{}: an adapter without a score head, needed a reward model (quantune reward makes one)",
            folder.display()
        ))),
    }
}

fn init_lora_weights(settings: &CommonSettings) -> Result<InitLoraWeights, TrainError> {
    let name = &settings.init_lora_weights;
    InitLoraWeights::from_name(name).ok_or_else(|| {
        let needed = "true, false, gaussian, pissa, pissa_niter_N, olora or loftq";
        TrainError::Settings(format!("init_lora_weights is {name:?}, needed {needed}"))
    })
}

fn lora_config(settings: &CommonSettings) -> Result<LoraConfig, TrainError> {
    // A single value that is not a plain module name is a regular expression, as in PEFT.
    let modules = |list: &[String]| match &split(list)[..] {
        [] => None,
        [one] if one == "all-linear" || one.contains(|c: char| !is_name(c)) => {
            Some(Modules::Expression(one.clone()))
        }
        names => Some(Modules::List(names.to_vec())),
    };
    let pattern = |key: &str, list: &[String]| -> Result<Vec<(String, f64)>, TrainError> {
        let pair = |item: &String| {
            let (pattern, value) = item.rsplit_once('=')?;
            Some((pattern.to_string(), value.trim().parse().ok()?))
        };
        let fault =
            |item: &String| TrainError::Settings(format!("{key} {item:?} is not REGEX=NUMBER"));
        split(list).iter().map(|item| pair(item).ok_or_else(|| fault(item))).collect()
    };
    let ranks = pattern("rank_pattern", &settings.rank_pattern)?;
    if let Some((pattern, r)) = ranks.iter().find(|(_, r)| r.fract() != 0.0 || *r < 1.0) {
        let fault = format!("rank_pattern {pattern:?} is {r}, needed a whole number above 0");
        return Err(TrainError::Settings(fault));
    }
    let init_lora_weights = init_lora_weights(settings)?;
    let is_loftq = init_lora_weights == InitLoraWeights::Loftq;
    if is_loftq == settings.loftq_base.as_os_str().is_empty() {
        let fault = match is_loftq {
            true => "init_lora_weights loftq needs loftq_base, the base before its quantization",
            false => "loftq_base is for init_lora_weights loftq",
        };
        return Err(TrainError::Settings(fault.into()));
    }
    let scores = |name: &&String| matches!(name.as_str(), "score" | "classifier");
    if let Some(name) = settings.modules_to_save.iter().find(scores) {
        let fault =
            format!("modules_to_save {name:?}: needed embed_tokens or lm_head; reward makes");
        return Err(TrainError::Settings(format!("{fault} a score head by itself")));
    }
    let layers = &settings.layers_to_transform;
    Ok(LoraConfig {
        task_type: Some("CAUSAL_LM".into()),
        base_model_name_or_path: Some(settings.base.display().to_string()),
        r: settings.r,
        lora_alpha: settings.lora_alpha,
        lora_dropout: settings.lora_dropout,
        target_modules: modules(&settings.target_modules),
        exclude_modules: modules(&settings.exclude_modules),
        rank_pattern: ranks.into_iter().map(|(pattern, r)| (pattern, r as usize)).collect(),
        alpha_pattern: pattern("alpha_pattern", &settings.alpha_pattern)?,
        layers_to_transform: (!layers.is_empty()).then(|| layers.clone()),
        layers_pattern: settings.layers_pattern.clone(),
        use_rslora: settings.use_rslora,
        use_dora: settings.use_dora,
        modules_to_save: settings.modules_to_save.clone(),
        trainable_token_indices: settings.trainable_token_indices.clone(),
        init_lora_weights,
        inference_mode: true, // PEFT loads a finished adapter as frozen by default
        ..LoraConfig::default()
    })
}

/// Splits values at commas, but not inside regular expressions.
fn split(list: &[String]) -> Vec<String> {
    let pieces = |item: &String| -> Vec<String> {
        match item.chars().all(|c| is_name(c) || matches!(c, ',' | '=' | ' ')) {
            true => item.split(',').map(|piece| piece.trim().to_string()).collect(),
            false => vec![item.clone()],
        }
    };
    list.iter().flat_map(pieces).filter(|piece| !piece.is_empty()).collect()
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '.'
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_value_is_a_name_or_an_expression() {
        let config = |targets: &[&str]| {
            let target_modules = targets.iter().map(|t| t.to_string()).collect();
            lora_config(&CommonSettings { target_modules, ..Default::default() }).unwrap()
        };
        let list =
            |names: &[&str]| Some(Modules::List(names.iter().map(|n| n.to_string()).collect()));
        assert_eq!(config(&["q_proj"]).target_modules, list(&["q_proj"]));
        assert_eq!(config(&["q_proj", "v_proj"]).target_modules, list(&["q_proj", "v_proj"]));
        assert_eq!(config(&["q_proj,v_proj"]).target_modules, list(&["q_proj", "v_proj"]));
        let expression = r".*\.\d{1,2}\..*\.(q|v)_proj";
        assert_eq!(
            config(&[expression]).target_modules,
            Some(Modules::Expression(expression.into()))
        );
    }
}
