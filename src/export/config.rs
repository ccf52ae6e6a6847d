//! A `config.json`, with the names that every version of transformers reads.

use serde_json::{Map, Value, json};

use super::ExportError;
use crate::model::Config;
use crate::model::config::RopeScaling;
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

/// Whether a `config.json` can say what a decoder is.
///
/// # Errors
/// What it cannot say.
pub fn expressible(config: &Config) -> Result<(), ExportError> {
    to_json(config, BlockType::F32, &Map::new()).map(|_| ())
}

/// The `config.json` of a decoder; `ids` are its special tokens, as a `generation_config.json`
/// names them.
pub(super) fn to_json(
    config: &Config,
    dtype: BlockType,
    ids: &Map<String, Value>,
) -> Result<Value, ExportError> {
    let c = config;
    let cannot = |reason: String| ExportError::Inexpressible { form: "a config.json", reason };
    let model_type = c.family.model_type;
    if let Some(what) = c.beyond_llama() {
        return Err(cannot(format!("{what} keeps the form it came in: folder or GGUF")));
    }
    // q, k and v of some families always have a bias, and o never; in the others all four or none.
    if !c.family.qkv_bias && c.qkv_bias != c.o_bias {
        let reason = format!("a {model_type} has a bias on q, k, v and o, or on none of them");
        return Err(cannot(reason));
    }
    if c.family.qkv_bias && (c.o_bias || c.mlp_bias) {
        return Err(cannot(format!("a {model_type} has biases on q, k and v only")));
    }
    let rope_scaling = match &c.rope_scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 { .. } => llama3(&c.rope_scaling),
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
        RopeScaling::Factors(factors) if factors.iter().all(|f| *f == 1.0) => Value::Null,
        RopeScaling::Factors(factors) => llama3(
            &as_llama3(config, factors)
                .ok_or_else(|| cannot("the factors of its rope_freqs are not Llama 3's".into()))?,
        ),
    };
    let mut json = Map::new();
    let mut put = |key: &str, value: Value| drop(json.insert(key.into(), value));
    let class: String = model_type[..1].to_uppercase() + &model_type[1..] + "ForCausalLM";
    put("architectures", json!([class]));
    put("model_type", model_type.into());
    put("hidden_size", c.hidden_size.into());
    put("intermediate_size", c.intermediate_size.into());
    put("num_hidden_layers", c.num_hidden_layers.into());
    put("num_attention_heads", c.num_attention_heads.into());
    put("num_key_value_heads", c.num_key_value_heads.into());
    put("head_dim", c.head_dim.into());
    put("vocab_size", c.vocab_size.into());
    put("max_position_embeddings", c.max_position_embeddings.into());
    put("hidden_act", "silu".into());
    put("rms_norm_eps", shortest(c.rms_norm_eps));
    put("rope_theta", shortest(c.rope_theta));
    put("rope_scaling", rope_scaling);
    put("tie_word_embeddings", c.tie_word_embeddings.into());
    if !c.family.qkv_bias {
        put("attention_bias", c.qkv_bias.into());
        put("mlp_bias", c.mlp_bias.into());
    }
    put("attention_dropout", json!(0.0));
    put("use_cache", true.into());
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        if let Some(id) = ids.get(key) {
            put(key, id.clone());
        }
    }
    put("torch_dtype", dtype_name(dtype)?.into());
    Ok(json.into())
}

/// A number that a GGUF holds in 32 bits as people write it: 1e-5, not 9.999999747378752e-6.
fn shortest(value: f64) -> Value {
    let narrow = value as f32;
    let text = narrow.to_string();
    match text.parse::<f64>() {
        Ok(short) if f64::from(narrow) == value => json!(short),
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

/// The parameters that Llama 3's formula gives these factors for, if there are any: its bands are
/// those of all models so far, the largest factor is the factor, and the context a power of two.
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
