//! The families: what each does differently from Llama whatever its size, a row each.

use crate::ops::Gate;

/// What tells one family from another.
#[derive(Debug, PartialEq)]
pub struct Family {
    /// `model_type` in a `config.json`.
    pub model_type: &'static str,
    /// The class in transformers, in a `config.json`'s `architectures`.
    pub class: &'static str,
    /// `general.architecture` in a GGUF.
    pub architecture: &'static str,
    /// Whether q, k and v always have a bias. Without, the checkpoint says.
    pub qkv_bias: bool,
    /// Whether llama.cpp's converter interleaves the rows of q and k of each head.
    pub interleaved_in_gguf: bool,
    /// Where norms stand in a layer.
    pub norms: Norms,
    /// What queries and keys are normed over before they are rotated.
    pub qk_norm: QkNorm,
    /// Whether a folder holds norm weights less 1. A GGUF holds them as they multiply.
    pub norm_less_one: bool,
    /// What becomes of the gate.
    pub gate: Gate,
    /// Whether q, k and v are one matrix in files, and gate and up another.
    pub fused: bool,
    /// Whether embeddings are multiplied by `sqrt(hidden_size)`.
    pub embedding_scaled: bool,
    /// Which layers see a window only.
    pub windows: Windows,
    /// The window, if neither form of file says.
    pub sliding_window: Option<usize>,
    /// Every so many layers, one does not rotate, if a `config.json` does not say which.
    pub no_rope_layer_interval: Option<usize>,
    /// Whether the scale of scores is `query_pre_attn_scalar^-1/2`.
    pub query_pre_attn_scalar: bool,
    /// Layers from which on a GGUF's scores have the scale of `hidden_size / heads` instead of
    /// `head_dim`: it has no key for it, and llama.cpp knows the 27B models by their depth.
    pub scale_by_hidden_size_at: Option<usize>,
    /// The caps on attention's scores and on logits, if neither form of file says.
    pub caps: (Option<f64>, Option<f64>),
    /// Whether embeddings, residuals, scores and logits have multipliers of their own.
    pub multipliers: bool,
    /// Whether the head is the embedding, if a `config.json` does not say.
    pub tied: bool,
    /// Whether llama.cpp has no place for a head beside the embedding.
    pub tied_in_gguf: bool,
    /// Whether rope scaling "yarn" in a `config.json` means longrope, as early ones have it.
    pub yarn_is_longrope: bool,
    /// The context that a model with longrope was first trained with, if a `config.json` does not say.
    pub original_positions: Option<usize>,
    /// Whether llama.cpp counts a model of 80 layers without grouped-query attention as its type 65B, not
    /// 70B: llama-quantize gives v more bits in a 70B.
    pub llama_cpp_has_65b: bool,
    /// Width of a head, if a `config.json` does not say and it is not `hidden_size / heads`.
    pub head_dim: Option<usize>,
    /// Base of the rotary frequencies, if neither form of file says.
    pub rope_theta: f64,
    /// Of layers with a window, where they have a base to themselves.
    pub local_rope_theta: Option<f64>,
}

/// Where norms stand in a layer, before or behind attention and feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norms {
    /// Before each.
    Before,
    /// Before and behind each, there before it joins the residual stream.
    Around,
    /// Behind each only.
    Behind,
}

/// What queries and keys are normed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// They are not.
    None,
    /// Each head.
    Head,
    /// All heads of a token together.
    Width,
}

/// Which layers see a window only, where there is one. `layer_types` of a `config.json` comes first.
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
    /// All but the last of every so many (`sliding_window_pattern`).
    AllBut(usize),
}

const LLAMA: Family = Family {
    model_type: "llama",
    class: "LlamaForCausalLM",
    architecture: "llama",
    qkv_bias: false,
    interleaved_in_gguf: true,
    norms: Norms::Before,
    qk_norm: QkNorm::None,
    norm_less_one: false,
    gate: Gate::Silu,
    fused: false,
    embedding_scaled: false,
    windows: Windows::Never,
    sliding_window: None,
    no_rope_layer_interval: None,
    query_pre_attn_scalar: false,
    scale_by_hidden_size_at: None,
    caps: (None, None),
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
    norms: Norms::Around,
    norm_less_one: true,
    gate: Gate::GeluTanh,
    embedding_scaled: true,
    windows: Windows::AllBut(2),
    sliding_window: Some(4096),
    query_pre_attn_scalar: true,
    scale_by_hidden_size_at: Some(46),
    caps: (Some(50.0), Some(30.0)),
    tied: true,
    tied_in_gguf: true,
    head_dim: Some(256),
    ..LLAMA
};

/// The families that run. Of those that share an architecture, a GGUF names the first.
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
        caps: (None, None),
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
        norms: Norms::Behind,
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
