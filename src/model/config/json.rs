//! Properties from a `config.json`, in the spellings of transformers 4 and 5.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::{
    Config, FAMILIES, Family, RopeScaling, Variation, Windows, known, longrope_attention_factor,
    yarn_attention_factor,
};
use crate::model::ModelError;
use crate::ops::Gate;

pub(super) fn read(path: &Path) -> Result<Value, ModelError> {
    let fail = |reason: String| ModelError::Config { path: path.display().to_string(), reason };
    let text = fs::read_to_string(path).map_err(|e| fail(e.to_string()))?;
    serde_json::from_str(&text).map_err(|e| fail(e.to_string()))
}

pub(super) fn config(json: &Value, faults: &mut Vec<String>) -> Option<Config> {
    let model_type = json["model_type"].as_str().unwrap_or_default();
    let Some(family) = FAMILIES.iter().find(|f| f.model_type == model_type) else {
        let known = known(|f| f.model_type);
        faults.push(format!("model_type {model_type:?} is not one that runs here ({known})"));
        return None;
    };
    let mut size = |key: &str, default: Option<usize>| {
        let found = json[key].as_u64().map(|n| n as usize);
        found.or(default.filter(|_| json[key].is_null())).unwrap_or_else(|| {
            faults.push(format!("{key} is {}, needed a whole number", json[key]));
            0
        })
    };
    let hidden_size = size("hidden_size", None);
    let heads = size("num_attention_heads", None);
    let head_dim = family.head_dim.unwrap_or(hidden_size / heads.max(1));
    let sizes = (
        size("num_hidden_layers", None),
        size("num_key_value_heads", Some(heads)),
        size("head_dim", Some(head_dim)),
        size("intermediate_size", None),
        size("vocab_size", None),
        size("max_position_embeddings", Some(2048)),
    );
    let (layers, kv_heads, head_dim, intermediate_size, vocab_size, max_positions) = sizes;

    let activation = match family.gate {
        Gate::Silu => "silu",
        Gate::GeluTanh => "gelu_pytorch_tanh",
    };
    for key in ["hidden_act", "hidden_activation"] {
        if let Some(act) = json[key].as_str().filter(|act| *act != activation) {
            faults.push(format!("{key} is {act:?}, needed {activation:?}"));
        }
    }
    if json["use_bidirectional_attention"].as_bool() == Some(true) {
        faults.push("use_bidirectional_attention is true, and attention here is causal".into());
    }
    // transformers 5 merges rope_theta and rope_scaling of transformers 4 into one key, and if layers with a
    // window have a different base, it has one entry per kind.
    let gathered = &json["rope_parameters"];
    let rope = match gathered.is_object() {
        true if gathered["full_attention"].is_object() => &gathered["full_attention"],
        true => gathered,
        false => &json["rope_scaling"],
    };
    let local_rope = &gathered["sliding_attention"];
    if let Some(kind) = local_rope["rope_type"].as_str().filter(|kind| *kind != "default") {
        faults.push(format!("layers with a window have rope_type {kind:?}, needed \"default\""));
    }
    let parts = [rope, json].map(|at| at["partial_rotary_factor"].as_f64());
    let part = parts.into_iter().flatten().next().filter(|part| *part != 1.0);
    let number = |at: &Value, key: &str| at[key].as_f64();
    let rope_theta = number(rope, "rope_theta").or(number(json, "rope_theta"));
    let local = number(local_rope, "rope_theta").or(number(json, "rope_local_base_freq"));
    let flag = |key: &str| json[key].as_bool().unwrap_or(false);
    let rope_scaling = rope_scaling(rope, json, (family, max_positions), faults);
    let mut variation = variation(json, family, (layers, hidden_size), faults);
    variation.local_rope_theta = family.local_rope_theta.map(|theta| local.unwrap_or(theta));
    variation.rotary_dim = part.map(|part| (head_dim as f64 * part) as usize);
    Some(Config {
        family,
        hidden_size,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        intermediate_size,
        vocab_size,
        max_position_embeddings: max_positions,
        rms_norm_eps: number(json, "rms_norm_eps").unwrap_or(1e-6),
        rope_theta: rope_theta.unwrap_or(family.rope_theta),
        rope_scaling,
        tie_word_embeddings: json["tie_word_embeddings"].as_bool().unwrap_or(family.tied),
        qkv_bias: family.qkv_bias || flag("attention_bias"),
        o_bias: !family.qkv_bias && flag("attention_bias"),
        mlp_bias: flag("mlp_bias"),
        variation,
    })
}

fn variation(
    json: &Value,
    family: &Family,
    (layers, hidden_size): (usize, usize),
    faults: &mut Vec<String>,
) -> Variation {
    let mut of = Variation::default();
    let number = |key: &str| json[key].as_f64();
    // A key with value null means none.
    let cap = |key: &str, default: Option<f64>| match json.get(key) {
        None => default,
        Some(value) => value.as_f64(),
    };
    let (attention_cap, logit_softcap) = family.softcaps;
    if family.query_pre_attn_scalar {
        of.attention_scale = number("query_pre_attn_scalar").map(|scalar| scalar.powf(-0.5));
        of.attn_logit_softcapping = cap("attn_logit_softcapping", attention_cap);
        of.final_logit_softcapping = cap("final_logit_softcapping", logit_softcap);
    }
    if family.embedding_scaled {
        of.embedding_multiplier = (hidden_size as f64).sqrt();
    }
    if family.multipliers {
        of.embedding_multiplier = number("embedding_multiplier").unwrap_or(1.0);
        of.residual_multiplier = number("residual_multiplier").unwrap_or(1.0);
        of.logits_multiplier = 1.0 / number("logits_scaling").unwrap_or(1.0);
        of.attention_scale = Some(number("attention_multiplier").unwrap_or(1.0));
    }
    let layers = layers.min(1 << 16); // a hostile count is rejected later
    if let Some(interval) = family.no_rope_layer_interval {
        of.rotated = match json["no_rope_layers"].as_array() {
            Some(layers) => layers.iter().map(|layer| *layer != 0).collect(),
            None => {
                let said = json["no_rope_layer_interval"].as_u64().map(|n| n as usize);
                let interval = said.unwrap_or(interval).max(1);
                (0..layers).map(|layer| !(layer + 1).is_multiple_of(interval)).collect()
            }
        };
        of.rotated.truncate(layers);
    }
    let says = json["use_sliding_window"].as_bool();
    let used = match family.windows {
        Windows::Never => {
            if says == Some(true) {
                let reason = "use_sliding_window is true, and this family has no windows here";
                faults.push(reason.into());
            }
            false
        }
        Windows::Upper | Windows::Unrotated => says == Some(true),
        Windows::All | Windows::AllBut(_) => true,
    };
    if used {
        let key = "sliding_window";
        of.sliding_window = match json.get(key) {
            None => family.sliding_window,
            Some(value) => value.as_u64().map(|window| window as usize),
        };
        if of.sliding_window.is_none() && json.get(key).is_some_and(|value| !value.is_null()) {
            faults.push(format!("{key} is {}, needed a whole number", json[key]));
        }
    }
    if of.sliding_window.is_some() {
        let size = |key: &str| json[key].as_u64().map(|n| n as usize);
        let windowed = |layer: usize| match family.windows {
            Windows::Never => false,
            Windows::All => true,
            Windows::Upper => layer >= size("max_window_layers").unwrap_or(0),
            Windows::Unrotated => of.rotated.get(layer) == Some(&false),
            Windows::AllBut(nth) => {
                let nth = size("sliding_window_pattern").unwrap_or(nth).max(1);
                !(layer + 1).is_multiple_of(nth)
            }
        };
        let windowed = match json["layer_types"].as_array() {
            None => (0..layers).map(windowed).collect(),
            Some(types) => {
                let known = ["full_attention", "sliding_attention"];
                let other = types.iter().find(|of| !known.iter().any(|k| **of == **k));
                if let Some(other) = other {
                    faults.push(format!("layer_types names {other}, needed one of {known:?}"));
                }
                types.iter().map(|of| of == known[1]).collect()
            }
        };
        of.windowed = windowed;
    }
    of
}

fn rope_scaling(
    rope: &Value,
    json: &Value,
    (family, max_positions): (&Family, usize),
    faults: &mut Vec<String>,
) -> RopeScaling {
    let kind = rope["rope_type"].as_str().or(rope["type"].as_str()).unwrap_or("default");
    let kind = match kind {
        "su" => "longrope",
        "yarn" if family.yarn_is_longrope => "longrope",
        other => other,
    };
    let number = |key: &str| rope[key].as_f64();
    if kind == "longrope" {
        let key = "original_max_position_embeddings";
        // The top-level key takes precedence, as in transformers.
        let original = [&json[key], &rope[key]].into_iter().find_map(Value::as_u64);
        let original = original.map(|original| original as usize).or(family.original_positions);
        let original = original.unwrap_or(max_positions);
        let mut factors = |key: &str| -> Vec<f32> {
            let found = rope[key].as_array().map(|all| all.iter().map(Value::as_f64).collect());
            let found: Option<Vec<f64>> = found.unwrap_or_default();
            let found = found.unwrap_or_else(|| {
                faults.push(format!("rope scaling \"longrope\" has no {key}, needed numbers"));
                Vec::new()
            });
            found.into_iter().map(|factor| factor as f32).collect()
        };
        let (short_factor, long_factor) = (factors("short_factor"), factors("long_factor"));
        let factor = number("factor").unwrap_or(max_positions as f64 / original as f64);
        return RopeScaling::LongRope {
            short_factor,
            long_factor,
            original_max_position_embeddings: original,
            attention_factor: number("attention_factor")
                .unwrap_or(longrope_attention_factor(factor, original as f64)),
        };
    }
    let mut need = |key: &str| {
        number(key).unwrap_or_else(|| {
            faults.push(format!("rope scaling {kind:?} has no {key}"));
            1.0
        })
    };
    match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor") },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor"),
            low_freq_factor: need("low_freq_factor"),
            high_freq_factor: need("high_freq_factor"),
            original_max_position_embeddings: need("original_max_position_embeddings"),
        },
        "yarn" => {
            let factor = need("factor");
            let original = number("original_max_position_embeddings");
            let growth = match (number("mscale"), number("mscale_all_dim")) {
                (Some(a), Some(b)) if a != 0.0 && b != 0.0 && factor > 1.0 => {
                    (0.1 * a * factor.ln() + 1.0) / (0.1 * b * factor.ln() + 1.0)
                }
                _ => yarn_attention_factor(factor),
            };
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original
                    .or(json["max_position_embeddings"].as_f64())
                    .unwrap_or(2048.0),
                beta_fast: number("beta_fast").unwrap_or(32.0),
                beta_slow: number("beta_slow").unwrap_or(1.0),
                truncate: rope["truncate"].as_bool().unwrap_or(true),
                attention_factor: number("attention_factor").unwrap_or(growth),
            }
        }
        other => {
            faults.push(format!(
                "rope scaling {other:?} does not run here (default, linear, llama3, longrope, yarn do)"
            ));
            RopeScaling::None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Config, Vec<String>> {
        let mut faults = Vec::new();
        let config = config(&serde_json::from_str(json).unwrap(), &mut faults);
        config.filter(|_| faults.is_empty()).ok_or(faults)
    }

    const LLAMA: &str = r#"{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 300, "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0"#;

    #[test]
    fn rope_keys_of_both_transformers_versions_are_read() {
        let old = format!(
            r#"{LLAMA}, "rope_scaling": {{"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}}}}"#
        );
        let new = old.replace("rope_scaling", "rope_parameters");
        let (old, new) = (read(&old).unwrap(), read(&new).unwrap());
        assert_eq!(old, new);
        assert_eq!(old.rope_theta, 500_000.0);
        let plain = read(&format!("{LLAMA}}}")).unwrap();
        let (scaled, plain) = (old.inv_freq(), plain.inv_freq());
        assert_eq!(scaled[0], plain[0]); // the highest frequency is kept
        assert!((plain[7] / scaled[7] - 8.0).abs() < 1e-4); // the lowest is divided
    }

    #[test]
    fn unsupported_properties_are_reported() {
        let cases = [
            (r#"{"model_type": "mamba"}"#.to_string(), "\"mamba\""),
            (format!(r#"{LLAMA}, "hidden_act": "gelu"}}"#), "gelu"),
            (
                format!(r#"{LLAMA}, "rope_scaling": {{"rope_type": "longrope"}}}}"#),
                "no long_factor",
            ),
            (format!(r#"{LLAMA}, "rope_scaling": {{"rope_type": "dynamic"}}}}"#), "dynamic"),
            (format!(r#"{LLAMA}, "rope_scaling": {{"rope_type": "yarn"}}}}"#), "no factor"),
            (format!(r#"{LLAMA}, "use_sliding_window": true}}"#), "use_sliding_window"),
            (LLAMA.replace("\"hidden_size\": 64", "\"hidden_size\": \"x\"") + "}", "hidden_size"),
        ];
        for (json, words) in cases {
            let faults = read(&json).unwrap_err().join("; ");
            assert!(faults.contains(words), "{faults}");
        }
    }

    /// The keys of early Phi-3 models, and of Phi-4-mini, which has partial rotary embedding.
    #[test]
    fn longrope_is_read_with_all_keys() {
        let json = LLAMA.replace("llama", "phi3");
        let of = |kind: &str, more: &str| {
            let json = format!(
                r#"{json}, "max_position_embeddings": 64, "partial_rotary_factor": 0.75,
                "rope_scaling": {{"type": "{kind}", "short_factor": [1, 1.5, 2, 2, 3, 4],
                "long_factor": [1, 2, 4, 8, 16, 32]}}{more}}}"#
            );
            read(&json).unwrap()
        };
        let long = of("longrope", r#", "original_max_position_embeddings": 16"#);
        assert_eq!(long, of("su", r#", "original_max_position_embeddings": 16"#));
        assert_eq!((long.rotary_dim(), long.inv_freq().len()), (12, 6));
        let (original, freqs) = long.long_inv_freq().unwrap();
        assert_eq!((original, freqs[5] * 8.0), (16, long.inv_freq()[5]));
        assert!((long.rope_attention_factor() - 1.5f32.sqrt()).abs() < 1e-6);
        // The family's default exceeds these positions: the context is not extended.
        assert_eq!(of("yarn", "").rope_attention_factor(), 1.0);
    }

    /// Defaults for keys that published Gemma 3 configs omit, and older key names.
    #[test]
    fn a_gemma_3_config_with_few_keys_is_read() {
        let json = LLAMA.replace("llama", "gemma3_text").replace("500000.0", "1000000.0");
        let json = json.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 7");
        let json = format!(
            r#"{json}, "sliding_window": 9, "rope_local_base_freq": 20000.0,
            "rope_scaling": {{"rope_type": "linear", "factor": 8.0}}, "query_pre_attn_scalar": 25}}"#
        );
        let found = read(&json).unwrap();
        let windowed = [true, true, true, true, true, false, true];
        assert_eq!(found.variation.windowed, windowed);
        assert_eq!(found.variation.local_rope_theta, Some(20_000.0));
        assert_eq!(found.variation.attention_scale, Some(0.2));
        assert_eq!(found.variation.embedding_multiplier, 8.0);
        assert_eq!(found.variation.final_logit_softcapping, None);
        assert!(found.tie_word_embeddings && found.head_dim == 256);
        assert_eq!(found.rope_scaling, RopeScaling::Linear { factor: 8.0 });
    }
}
