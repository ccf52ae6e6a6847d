//! Writes a `config.json` with the key names that all versions of transformers read.

use serde_json::{Map, Value, json};

use super::ExportError;
use crate::model::Config;
use crate::model::config::{RopeScaling, Windows};
use crate::ops::Gate;
use crate::quant::BlockType;

/// The name of a type in a `config.json`.
pub(super) fn dtype_name(dtype: BlockType) -> Result<&'static str, ExportError> {
    match dtype {
        BlockType::F32 => Ok("float32"),
        BlockType::F16 => Ok("float16"),
        BlockType::BF16 => Ok("bfloat16"),
        other => Err(ExportError::Types(format!(
            "a Hugging Face folder holds F32, F16 or BF16, not {other}: a GGUF does"
        ))),
    }
}

/// Checks that a `config.json` can describe a decoder.
///
/// # Errors
/// With the property that it cannot describe.
pub(crate) fn expressible(config: &Config) -> Result<(), ExportError> {
    to_json(config, BlockType::F32, &Map::new()).map(|_| ())
}

/// The `config.json` of a decoder; `ids` are its special tokens, with the keys of a
/// `generation_config.json`.
pub(super) fn to_json(
    config: &Config,
    dtype: BlockType,
    ids: &Map<String, Value>,
) -> Result<Value, ExportError> {
    let c = config;
    let cannot = |reason: String| ExportError::Inexpressible { form: "a config.json", reason };
    let (family, v) = (c.hf_family(), &c.variation);
    let model_type = family.model_type;
    // q, k and v of some families always have a bias, and o never; in the others all four or none.
    if !c.family.qkv_bias && c.qkv_bias != c.o_bias {
        let reason = format!("a {model_type} has a bias on q, k, v and o, or on none of them");
        return Err(cannot(reason));
    }
    if c.family.qkv_bias && (c.o_bias || c.mlp_bias) {
        return Err(cannot(format!("a {model_type} has biases on q, k and v only")));
    }
    let mut json = Map::new();
    let mut put = |key: &str, value: Value| drop(json.insert(key.into(), value));
    put("architectures", json!([family.class]));
    put("model_type", model_type.into());
    put("hidden_size", c.hidden_size.into());
    put("intermediate_size", c.intermediate_size.into());
    put("num_hidden_layers", c.num_hidden_layers.into());
    put("num_attention_heads", c.num_attention_heads.into());
    put("num_key_value_heads", c.num_key_value_heads.into());
    put("head_dim", c.head_dim.into());
    put("vocab_size", c.vocab_size.into());
    put("max_position_embeddings", c.max_position_embeddings.into());
    match family.gate {
        Gate::Silu => put("hidden_act", "silu".into()),
        Gate::GeluTanh => put("hidden_activation", "gelu_pytorch_tanh".into()),
    }
    put("rms_norm_eps", tidy(c.rms_norm_eps));
    put("rope_theta", tidy(c.rope_theta));
    put("rope_scaling", rope_scaling_json(c)?);
    if let Some(theta) = v.local_rope_theta {
        put("rope_local_base_freq", tidy(theta));
    }
    if let RopeScaling::LongRope { original_max_position_embeddings: original, .. } = c.rope_scaling
    {
        put("original_max_position_embeddings", original.into());
    }
    if let Some(width) = v.rotary_dim {
        let part = width as f64 / c.head_dim as f64;
        // transformers truncates its product with the head size to an integer.
        let falls_short = ((c.head_dim as f64 * part) as usize) < width;
        put("partial_rotary_factor", json!(if falls_short { part.next_up() } else { part }));
    }
    put("tie_word_embeddings", c.tie_word_embeddings.into());
    if !family.qkv_bias && !family.fused {
        put("attention_bias", c.qkv_bias.into());
        put("mlp_bias", c.mlp_bias.into());
    }
    for (key, value) in of_variation(c) {
        put(key, value);
    }
    put("attention_dropout", json!(0.0));
    put("use_cache", true.into());
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        match ids.get(key) {
            Some(id) => put(key, id.clone()),
            // Some classes have a default id, which may be outside of a small vocabulary.
            None if key == "pad_token_id" => put(key, Value::Null),
            None => {}
        }
    }
    put("torch_dtype", dtype_name(dtype)?.into());
    Ok(json.into())
}

/// The value of `rope_scaling`.
fn rope_scaling_json(config: &Config) -> Result<Value, ExportError> {
    let cannot =
        |reason: &str| ExportError::Inexpressible { form: "a config.json", reason: reason.into() };
    Ok(match &config.rope_scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 { .. } => llama3(&config.rope_scaling),
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast,
            beta_slow,
            truncate,
            attention_factor,
        } => json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": *original as u64,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "truncate": truncate,
            "attention_factor": attention_factor,
        }),
        RopeScaling::LongRope { short_factor, long_factor, attention_factor, .. } => {
            let numbers = |of: &[f32]| -> Vec<Value> {
                of.iter().map(|factor| tidy(f64::from(*factor))).collect()
            };
            json!({
                "type": "longrope",
                "rope_type": "longrope",
                "short_factor": numbers(short_factor),
                "long_factor": numbers(long_factor),
                "attention_factor": tidy(*attention_factor),
            })
        }
        RopeScaling::Factors(factors) if factors.iter().all(|f| *f == 1.0) => Value::Null,
        RopeScaling::Factors(factors) => llama3(
            &as_llama3(config, factors)
                .ok_or_else(|| cannot("the factors of its rope_freqs are not Llama 3's"))?,
        ),
    })
}

/// The keys that only some families have.
fn of_variation(c: &Config) -> Vec<(&'static str, Value)> {
    let (family, v) = (c.hf_family(), &c.variation);
    let mut keys = Vec::new();
    let maybe = |value: Option<f64>| value.map_or(Value::Null, tidy);
    let windowed = !v.windowed.is_empty();
    let used = matches!(family.windows, Windows::Upper | Windows::Unrotated);
    if used && windowed {
        keys.push(("use_sliding_window", true.into()));
    }
    if windowed || matches!(family.windows, Windows::All | Windows::AllBut(_)) {
        keys.push(("sliding_window", v.sliding_window.map_or(Value::Null, Into::into)));
    }
    if windowed && (used || matches!(family.windows, Windows::AllBut(_))) {
        let of = |windowed: &bool| if *windowed { "sliding_attention" } else { "full_attention" };
        keys.push(("layer_types", v.windowed.iter().map(of).collect()));
    }
    if family.no_rope_layer_interval.is_some() {
        keys.push(("no_rope_layers", v.rotated.iter().map(|rotates| u8::from(*rotates)).collect()));
    }
    let usual = (c.head_dim as f64).powf(-0.5);
    let scale = v.attention_scale.unwrap_or(usual);
    if family.query_pre_attn_scalar {
        let scalar = scale.powi(-2);
        let scalar = if (scalar - scalar.round()).abs() < 1e-6 {
            json!(scalar.round() as u64)
        } else {
            json!(scalar)
        };
        keys.push(("query_pre_attn_scalar", scalar));
        keys.push(("attn_logit_softcapping", maybe(v.attn_logit_softcapping)));
        keys.push(("final_logit_softcapping", maybe(v.final_logit_softcapping)));
    }
    if family.multipliers {
        keys.push(("embedding_multiplier", tidy(v.embedding_multiplier)));
        keys.push(("residual_multiplier", tidy(v.residual_multiplier)));
        keys.push(("attention_multiplier", tidy(scale)));
        keys.push(("logits_scaling", tidy(1.0 / v.logits_multiplier)));
    }
    keys
}

/// A number that was stored in 32 bits with the fewest digits: 1e-5, not 9.999999747378752e-6.
fn tidy(value: f64) -> Value {
    let narrow = value as f32;
    let same = (f64::from(narrow) - value).abs() <= 1e-12 * value.abs();
    match narrow.to_string().parse::<f64>() {
        Ok(short) if same => json!(short),
        _ => json!(value),
    }
}

fn llama3(scaling: &RopeScaling) -> Value {
    let RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings: original,
    } = scaling
    else {
        return Value::Null;
    };
    json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low_freq_factor,
        "high_freq_factor": high_freq_factor,
        "original_max_position_embeddings": *original as u64,
    })
}

/// The parameters with which Llama 3's formula gives these factors, if there are any. Tried are the
/// frequency bands of all models so far, the largest factor, and contexts that are powers of two.
fn as_llama3(config: &Config, factors: &[f32]) -> Option<RopeScaling> {
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    (4..=20).map(|power| f64::from(1u32 << power)).find_map(|original| {
        let scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: original,
        };
        let config = Config { rope_scaling: scaling.clone(), ..config.clone() };
        let same = |(a, b): (f32, &f32)| (a / b - 1.0).abs() < 1e-4;
        config.rope_factors()?.into_iter().zip(factors).all(same).then_some(scaling)
    })
}
