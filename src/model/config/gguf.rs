//! Properties from a GGUF's keys, with llama.cpp's defaults for missing keys.

use super::{
    Config, FAMILIES, Family, RopeScaling, Variation, Windows, known, yarn_attention_factor,
};
use crate::model::ModelError;
use crate::weights::Gguf;

pub(super) fn config(gguf: &Gguf, faults: &mut Vec<String>) -> Result<Option<Config>, ModelError> {
    let architecture = gguf.str("general.architecture")?.unwrap_or_default().to_string();
    let Some(family) = FAMILIES.iter().find(|f| f.architecture == architecture) else {
        let known = known(|f| f.architecture);
        faults.push(format!(
            "general.architecture {architecture:?} is not one that runs here ({known})"
        ));
        return Ok(None);
    };
    let key = |name: &str| format!("{architecture}.{name}");
    let mut size = |name: &str, default: Option<usize>| -> Result<usize, ModelError> {
        let found = gguf.u64(&key(name))?.map(|n| n as usize).or(default);
        Ok(found.unwrap_or_else(|| {
            faults.push(format!("no metadata key {:?}", key(name)));
            0
        }))
    };
    let hidden_size = size("embedding_length", None)?;
    let heads = size("attention.head_count", None)?;
    let head_dim = size("attention.key_length", Some(hidden_size / heads.max(1)))?;
    let value_dim = size("attention.value_length", Some(head_dim))?;
    let rotated = size("rope.dimension_count", Some(head_dim))?;
    let layers = size("block_count", None)?;
    let kv_heads = size("attention.head_count_kv", Some(heads))?;
    let intermediate_size = size("feed_forward_length", None)?;
    let max_positions = size("context_length", None)?;
    if value_dim != head_dim {
        faults.push(format!(
            "heads are {head_dim} wide with values of {value_dim}; only equal widths run here"
        ));
    }
    if rotated != head_dim && family.interleaved_in_gguf {
        faults.push(format!(
            "{rotated} numbers of heads of {head_dim} rotate; in a {architecture} only whole heads do"
        ));
    }
    if let Some(experts) = gguf.u64(&key("expert_count"))?.filter(|&experts| experts > 0) {
        faults.push(format!("it has {experts} experts, and mixtures of experts do not run here"));
    }
    // The embedding knows the size of the vocabulary; a metadata key for it is optional.
    let vocab_size = match gguf.tensor_info("token_embd.weight") {
        Some(embedding) => *embedding.shape.first().unwrap_or(&0),
        None => {
            faults.push("no tensor \"token_embd.weight\"".into());
            0
        }
    };
    let rms_norm_eps = gguf.f64(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or_else(|| {
        faults.push(format!("no metadata key {:?}", key("attention.layer_norm_rms_epsilon")));
        1e-5
    });
    let shape = (layers, heads, hidden_size, head_dim);
    let mut variation = variation(gguf, family, shape)?;
    variation.rotary_dim = Some(rotated).filter(|&rotated| rotated != head_dim);
    let rope_scaling = rope_scaling(gguf, family, max_positions, faults)?;
    Ok(Some(Config {
        family,
        hidden_size,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        intermediate_size,
        vocab_size,
        max_position_embeddings: max_positions,
        rms_norm_eps,
        rope_theta: gguf.f64(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        rope_scaling,
        tie_word_embeddings: gguf.tensor_info("output.weight").is_none(),
        qkv_bias: family.qkv_bias || gguf.tensor_info("blk.0.attn_q.bias").is_some(),
        o_bias: gguf.tensor_info("blk.0.attn_output.bias").is_some(),
        mlp_bias: gguf.tensor_info("blk.0.ffn_up.bias").is_some(),
        variation,
    }))
}

fn variation(
    gguf: &Gguf,
    family: &Family,
    (layers, heads, hidden_size, head_dim): (usize, usize, usize, usize),
) -> Result<Variation, ModelError> {
    let key = |name: &str| format!("{}.{name}", family.architecture);
    let number = |name: &str| gguf.f64(&key(name));
    let mut of = Variation::default();
    let (attention_cap, logit_softcap) = family.softcaps;
    if family.query_pre_attn_scalar {
        let present = |cap: Option<f64>| cap.filter(|&cap| cap != 0.0);
        let width = match family.scale_by_hidden_size_at {
            Some(depth) if depth == layers => hidden_size / heads.max(1),
            _ => head_dim,
        };
        of.attention_scale = Some((width as f64).powf(-0.5));
        if attention_cap.is_some() {
            of.attn_logit_softcapping =
                present(number("attn_logit_softcapping")?.or(attention_cap));
        }
        of.final_logit_softcapping = present(number("final_logit_softcapping")?.or(logit_softcap));
    }
    if family.embedding_scaled {
        of.embedding_multiplier = (hidden_size as f64).sqrt();
    }
    if family.multipliers {
        // llama.cpp treats 0 as none.
        let scale = |name: &str| Ok::<_, ModelError>(number(name)?.filter(|&scale| scale != 0.0));
        of.embedding_multiplier = scale("embedding_scale")?.unwrap_or(1.0);
        of.residual_multiplier = scale("residual_scale")?.unwrap_or(1.0);
        of.logits_multiplier = 1.0 / scale("logit_scale")?.unwrap_or(1.0);
        of.attention_scale = scale("attention.scale")?;
    }
    let layers = layers.min(1 << 16); // a hostile count is rejected later
    let window = gguf.u64(&key("attention.sliding_window"))?.map(|window| window as usize);
    let window = window.or(family.sliding_window).filter(|&window| window > 0);
    match (family.windows, window) {
        // Qwen's files have a window that is not used.
        (_, None) | (Windows::Upper | Windows::Unrotated, _) => {}
        // A Mistral is written as a Llama. llama.cpp's converter leaves its window out and its programs
        // attend to all there is, so of such a file we do too; what we write ourselves has the window.
        (Windows::Never | Windows::All, Some(window)) => {
            of.sliding_window = Some(window);
            of.windowed = vec![true; layers];
        }
        (Windows::AllBut(nth), Some(window)) => {
            of.sliding_window = Some(window);
            let pattern = key("attention.sliding_window_pattern");
            of.windowed = match gguf.get(&pattern).and_then(|value| value.as_array()) {
                Some(flags) => flags.iter().map(|flag| flag.as_bool().unwrap_or(false)).collect(),
                None => {
                    let nth = gguf.u64(&pattern)?.map_or(nth, |nth| nth as usize).max(1);
                    (0..layers).map(|layer| !(layer + 1).is_multiple_of(nth)).collect()
                }
            };
        }
    }
    if let Some(interval) = family.no_rope_layer_interval {
        of.rotated = (0..layers).map(|layer| !(layer + 1).is_multiple_of(interval)).collect();
    }
    if let Some(theta) = family.local_rope_theta.filter(|_| !of.windowed.is_empty()) {
        of.local_rope_theta = Some(number("rope.freq_base_swa")?.unwrap_or(theta));
    }
    Ok(of)
}

fn rope_scaling(
    gguf: &Gguf,
    family: &Family,
    max_positions: usize,
    faults: &mut Vec<String>,
) -> Result<RopeScaling, ModelError> {
    let number = |name: &str| gguf.f64(&format!("{}.rope.{name}", family.architecture));
    let original = format!("{}.rope.scaling.original_context_length", family.architecture);
    let original = gguf.u64(&original)?.map_or(max_positions, |original| original as usize);
    let grown = number("scaling.attn_factor")?;
    if gguf.tensor_info("rope_factors_long.weight").is_some() {
        return Ok(RopeScaling::LongRope {
            short_factor: gguf.tensor("rope_factors_short.weight")?.vector()?,
            long_factor: gguf.tensor("rope_factors_long.weight")?.vector()?,
            original_max_position_embeddings: original,
            attention_factor: grown.unwrap_or(1.0),
        });
    }
    if gguf.tensor_info("rope_freqs.weight").is_some() {
        return Ok(RopeScaling::Factors(gguf.tensor("rope_freqs.weight")?.vector()?));
    }
    // As in llama.cpp: linear by default, an older key for the factor, 0 for none.
    let factor = match number("scaling.factor")? {
        None => number("scale_linear")?.unwrap_or(0.0),
        Some(factor) => factor,
    };
    Ok(match gguf.str(&format!("{}.rope.scaling.type", family.architecture))? {
        Some("none") => RopeScaling::None,
        None | Some("linear" | "yarn") if factor == 0.0 => RopeScaling::None,
        None | Some("linear") => RopeScaling::Linear { factor },
        Some("yarn") => {
            if number("scaling.yarn_log_multiplier")?.is_some_and(|by| by != 0.0) {
                faults.push("rope scaling \"yarn\" with a log multiplier does not run here".into());
            }
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original as f64,
                beta_fast: number("scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: number("scaling.yarn_beta_slow")?.unwrap_or(1.0),
                truncate: true,
                // llama.cpp reads one of the keys, and its converter writes the other.
                attention_factor: match grown {
                    Some(grown) => grown * yarn_attention_factor(factor),
                    None => {
                        number("scaling.yarn_attn_factor")?.unwrap_or(yarn_attention_factor(factor))
                    }
                },
            }
        }
        Some(other) => {
            faults.push(format!("rope scaling {other:?} does not run here"));
            RopeScaling::None
        }
    })
}
