//! The model families: one row each, with its size-independent differences from Llama.

use crate::ops::Gate;

/// Properties that differ between families.
#[derive(Debug, PartialEq)]
pub struct Family {
    /// `model_type` in a `config.json`.
    pub model_type: &'static str,
    /// The class in transformers, in a `config.json`'s `architectures`.
    pub class: &'static str,
    /// `general.architecture` in a GGUF.
    pub architecture: &'static str,
    /// Whether q, k and v always have a bias; if `false`, the checkpoint decides.
    pub qkv_bias: bool,
    /// Whether llama.cpp's converter interleaves the rows of q and k of each head.
    pub interleaved_in_gguf: bool,
    /// Positions of the norms in a layer.
    pub norms: NormPlacement,
    /// Norm of queries and keys before rotation.
    pub qk_norm: QkNorm,
    /// Whether folders store norm weights minus 1 (the norm multiplies by `1 + w`); a GGUF stores `1 + w`.
    pub norm_weight_offset: bool,
    /// Activation of the gate.
    pub gate: Gate,
    /// Whether q, k and v are one fused matrix, and gate and up another.
    pub fused: bool,
    /// Whether embeddings are multiplied by `sqrt(hidden_size)`.
    pub embedding_scaled: bool,
    /// Layers with sliding-window attention.
    pub windows: Windows,
    /// The window size, if the file has none.
    pub sliding_window: Option<usize>,
    /// Interval of layers without rotary embeddings, if a `config.json` does not list them.
    pub no_rope_layer_interval: Option<usize>,
    /// Whether the scale of scores is `query_pre_attn_scalar^-1/2`.
    pub query_pre_attn_scalar: bool,
    /// Layers from which on a GGUF's scores have the scale of `hidden_size / heads` instead of
    /// `head_dim`: it has no key for it, and llama.cpp knows the 27B models by their depth.
    pub scale_by_hidden_size_at: Option<usize>,
    /// Softcaps of attention scores and of final logits, if the file has none.
    pub softcaps: (Option<f64>, Option<f64>),
    /// Whether embeddings, residuals, scores and logits have configurable multipliers.
    pub multipliers: bool,
    /// Whether lm_head is tied to the embedding, if a `config.json` does not have the key.
    pub tied: bool,
    /// Whether llama.cpp does not support an untied lm_head.
    pub tied_in_gguf: bool,
    /// Whether rope scaling "yarn" in a `config.json` means longrope, as in early configs.
    pub yarn_is_longrope: bool,
    /// The original context length of a model with longrope, if a `config.json` does not have the key.
    pub original_positions: Option<usize>,
    /// Whether llama.cpp classifies a model of 80 layers without grouped-query attention as type 65B, not
    /// 70B: llama-quantize gives v more bits in a 70B.
    pub llama_cpp_has_65b: bool,
    /// Head width, if a `config.json` does not have the key and it is not `hidden_size / heads`.
    pub head_dim: Option<usize>,
    /// Base of the rotary frequencies, if the file has none.
    pub rope_theta: f64,
    /// Base of the rotary frequencies of sliding-window layers, if it differs.
    pub local_rope_theta: Option<f64>,
}

/// Positions of the norms of attention and feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before each.
    Pre,
    /// Before and after each, the latter before the residual addition.
    Sandwich,
    /// After each only.
    Post,
}

/// Norm of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// No norm.
    None,
    /// Each head.
    Head,
    /// All heads of a token together.
    Width,
}

/// Layers with sliding-window attention, unless `layer_types` of a `config.json` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Windows {
    /// None.
    Never,
    /// All.
    All,
    /// From layer `max_window_layers` on, if `use_sliding_window`.
    Upper,
    /// Those that do not rotate, if `use_sliding_window`.
    Unrotated,
    /// All but every n-th layer (`sliding_window_pattern`).
    AllBut(usize),
}

const LLAMA: Family = Family {
    model_type: "llama",
    class: "LlamaForCausalLM",
    architecture: "llama",
    qkv_bias: false,
    interleaved_in_gguf: true,
    norms: NormPlacement::Pre,
    qk_norm: QkNorm::None,
    norm_weight_offset: false,
    gate: Gate::Silu,
    fused: false,
    embedding_scaled: false,
    windows: Windows::Never,
    sliding_window: None,
    no_rope_layer_interval: None,
    query_pre_attn_scalar: false,
    scale_by_hidden_size_at: None,
    softcaps: (None, None),
    multipliers: false,
    tied: false,
    tied_in_gguf: false,
    yarn_is_longrope: false,
    original_positions: None,
    llama_cpp_has_65b: true,
    head_dim: None,
    rope_theta: 10_000.0,
    local_rope_theta: None,
};

const QWEN2: Family = Family {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    architecture: "qwen2",
    llama_cpp_has_65b: false,
    qkv_bias: true,
    interleaved_in_gguf: false,
    windows: Windows::Upper,
    ..LLAMA
};

const GEMMA2: Family = Family {
    model_type: "gemma2",
    class: "Gemma2ForCausalLM",
    architecture: "gemma2",
    llama_cpp_has_65b: false,
    interleaved_in_gguf: false,
    norms: NormPlacement::Sandwich,
    norm_weight_offset: true,
    gate: Gate::GeluTanh,
    embedding_scaled: true,
    windows: Windows::AllBut(2),
    sliding_window: Some(4096),
    query_pre_attn_scalar: true,
    scale_by_hidden_size_at: Some(46),
    softcaps: (Some(50.0), Some(30.0)),
    tied: true,
    tied_in_gguf: true,
    head_dim: Some(256),
    ..LLAMA
};

/// The supported families. Of those that share an architecture, a GGUF is read as the first.
pub const FAMILIES: &[Family] = &[
    LLAMA,
    QWEN2,
    Family { model_type: "mistral", class: "MistralForCausalLM", windows: Windows::All, ..LLAMA },
    Family {
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        architecture: "qwen3",
        qkv_bias: false,
        qk_norm: QkNorm::Head,
        head_dim: Some(128),
        ..QWEN2
    },
    GEMMA2,
    Family {
        model_type: "gemma3_text",
        class: "Gemma3ForCausalLM",
        architecture: "gemma3",
        qk_norm: QkNorm::Head,
        windows: Windows::AllBut(6),
        scale_by_hidden_size_at: Some(62),
        softcaps: (None, None),
        tied_in_gguf: false,
        rope_theta: 1_000_000.0,
        local_rope_theta: Some(10_000.0),
        ..GEMMA2
    },
    Family {
        model_type: "phi3",
        class: "Phi3ForCausalLM",
        architecture: "phi3",
        llama_cpp_has_65b: false,
        interleaved_in_gguf: false,
        fused: true,
        windows: Windows::All,
        yarn_is_longrope: true,
        original_positions: Some(4096),
        ..LLAMA
    },
    Family {
        model_type: "smollm3",
        class: "SmolLM3ForCausalLM",
        architecture: "smollm3",
        llama_cpp_has_65b: false,
        windows: Windows::Unrotated,
        no_rope_layer_interval: Some(4),
        tied: true,
        rope_theta: 2_000_000.0,
        ..LLAMA
    },
    Family {
        model_type: "olmo2",
        class: "Olmo2ForCausalLM",
        architecture: "olmo2",
        llama_cpp_has_65b: false,
        interleaved_in_gguf: false,
        norms: NormPlacement::Post,
        qk_norm: QkNorm::Width,
        ..LLAMA
    },
    Family {
        model_type: "granite",
        class: "GraniteForCausalLM",
        architecture: "granite",
        llama_cpp_has_65b: false,
        multipliers: true,
        ..LLAMA
    },
];
