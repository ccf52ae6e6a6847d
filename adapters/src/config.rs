//! PEFT's `adapter_config.json`: the keys of LoRA, read with all errors reported at once, and written
//! so that PEFT loads it.
//!
//! Unknown keys are ignored, as PEFT's files gain keys with each version. Keys with which PEFT computes
//! something that is not supported here are errors.

use serde_json::{Map, Number, Value, json};

/// A choice of modules: the value of `target_modules` and `exclude_modules`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Modules {
    /// A regular expression in Python's syntax that must match a module's whole path; as
    /// `target_modules` also `all-linear`: every linear layer but the output head.
    Expression(String),
    /// Module paths, or ends of them after a dot.
    List(Vec<String>),
}

/// `init_lora_weights`: how A and B are initialized. B is zero where not stated otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// `true`: A like `torch.nn.Linear`, uniform in `±1/sqrt(in)`.
    KaimingUniform,
    /// `false`: A and B both like `torch.nn.Linear`, B uniform in `±1/sqrt(r)`. For tests: the adapter
    /// changes the model before it is trained.
    Random,
    /// `"gaussian"`: A normal with standard deviation `1/r`.
    Gaussian,
    /// `"pissa"`: the base's r largest singular triples (Meng et al. 2024), exact or, as
    /// `"pissa_niter_16"`, by that many rounds of randomized subspace iteration.
    Pissa {
        /// Rounds of the iteration.
        niter: Option<usize>,
    },
    /// `"olora"`: the first r columns of Q and rows of R of the base's QR (Büyükakyüz 2024).
    Olora,
    /// `"loftq"`: the leading singular triples of the base's quantization error (Li et al. 2023).
    Loftq,
    /// An initialization that is not implemented and does not change the base's weights (`"eva"`,
    /// `"orthogonal"`): adapters initialized by it can be read and trained further.
    Stored(String),
}

/// The LoRA part of `adapter_config.json`, under PEFT's names.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// PEFT's task type: `CAUSAL_LM`, or `SEQ_CLS` with a score head.
    pub task_type: Option<String>,
    /// Name or path of the base. Only written and reported here: nothing is loaded by it.
    pub base_model_name_or_path: Option<String>,
    /// Revision of the base.
    pub revision: Option<String>,
    /// Rank of the update.
    pub r: usize,
    /// The update is scaled by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Probability in `[0, 1)` that an input of A is dropped in training.
    pub lora_dropout: f64,
    /// Modules that get an update; `None` leaves the choice to PEFT's table by model family.
    pub target_modules: Option<Modules>,
    /// Modules that get none although they are targets.
    pub exclude_modules: Option<Modules>,
    /// Ranks of single modules, by a regular expression for the end of a module path; the first match
    /// counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// `lora_alpha` of single modules, by expressions as in `rank_pattern`.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Restricts targets given as a list of path ends to these layers.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Names of the module lists that `layers_to_transform` counts in, by default any.
    pub layers_pattern: Vec<String>,
    /// Scale by `lora_alpha / sqrt(r)` instead (rsLoRA, Kalajdzievski 2023).
    pub use_rslora: bool,
    /// DoRA (Liu et al. 2024): a trained magnitude for each row of the merged weight.
    pub use_dora: bool,
    /// How A and B are initialized.
    pub init_lora_weights: InitLoraWeights,
    /// Modules trained as a whole and stored with the updates, by path or its end: [`SCORE`],
    /// [`EMBEDDING`], [`HEAD`]; PEFT lists both `classifier` and `score`, of which a model has one.
    pub modules_to_save: Vec<String>,
    /// Tokens whose rows of the embedding are trained, in the order of the file's rows; of a tied head
    /// too.
    pub trainable_token_indices: Vec<u32>,
    /// Tokens whose rows of an untied head are trained: `lm_head` in PEFT's
    /// `{"embed_tokens": [...], "lm_head": [...]}`.
    pub head_token_indices: Vec<u32>,
    /// Whether PEFT loads the adapter frozen.
    pub inference_mode: bool,
}

/// Module name of the head of a sequence classifier, in transformers' models of most families.
pub const SCORE: &str = "score";
/// The other name of it that PEFT lists for every sequence classifier.
pub(crate) const CLASSIFIER: &str = "classifier";
/// The token embedding's module path.
pub const EMBEDDING: &str = "model.embed_tokens";
/// The output head's module path.
pub const HEAD: &str = "lm_head";

/// PEFT's defaults.
impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            task_type: None,
            base_model_name_or_path: None,
            revision: None,
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: None,
            exclude_modules: None,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            use_rslora: false,
            use_dora: false,
            init_lora_weights: InitLoraWeights::KaimingUniform,
            modules_to_save: Vec::new(),
            trainable_token_indices: Vec::new(),
            head_token_indices: Vec::new(),
            inference_mode: false,
        }
    }
}

/// Why an adapter config cannot be used. The caller names the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Not a JSON object.
    #[error("not an adapter config: {0}")]
    Json(String),
    /// All keys that are wrong or not supported, a clause for each.
    #[error("{}", .0.join("; "))]
    Keys(Vec<String>),
}

/// Maximum rank: larger than any layer needs, and `r * in_features` cannot overflow.
const MAX_R: usize = 65536;

/// Keys that change what PEFT computes unless they are null, false or empty.
const UNSUPPORTED: [&str; 13] = [
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "target_parameters",
    "layer_replication",
    "megatron_config",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "lora_ga_config",
];

impl LoraConfig {
    /// Reads the text of an `adapter_config.json`.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let value: Value =
            serde_json::from_str(text).map_err(|e| ConfigError::Json(e.to_string()))?;
        let Value::Object(map) = value else {
            return Err(ConfigError::Json(format!("found {value}, needed an object")));
        };
        let mut keys = KeyReader { map: &map, problems: Vec::new() };
        match map.get("peft_type") {
            Some(Value::String(s)) if s == "LORA" => {}
            Some(other) => keys.reject("peft_type", other, "\"LORA\""),
            None => keys.problems.push("peft_type is missing, needed \"LORA\"".into()),
        }
        match map.get("bias") {
            None | Some(Value::Null) => {}
            Some(Value::String(s)) if s == "none" => {}
            Some(other) => keys.reject("bias", other, "\"none\": training biases is not supported"),
        }
        for key in UNSUPPORTED {
            if let Some(value) = map.get(key).filter(|v| !is_empty(v)) {
                keys.reject(key, value, "none: it is not supported");
            }
        }
        let default = Self::default();
        let read = |v: &Value| v.as_str().map(String::from);
        let [trainable_token_indices, head_token_indices] =
            keys.read("trainable_token_indices", TOKENS_NEEDED, token_indices).unwrap_or_default();
        let config = Self {
            task_type: keys.read("task_type", "a string", read),
            base_model_name_or_path: keys.read("base_model_name_or_path", "a string", read),
            revision: keys.read("revision", "a string", read),
            r: keys.read("r", "a whole number", whole).unwrap_or(default.r),
            lora_alpha: keys.read("lora_alpha", "a number", number).unwrap_or(default.lora_alpha),
            lora_dropout: keys.read("lora_dropout", "a number", number).unwrap_or(0.0),
            target_modules: keys.read("target_modules", "a string or a list of strings", modules),
            exclude_modules: keys.read("exclude_modules", "a string or a list of strings", modules),
            rank_pattern: keys
                .read("rank_pattern", "an object of whole numbers", |v| pattern(v, whole))
                .unwrap_or_default(),
            alpha_pattern: keys
                .read("alpha_pattern", "an object of numbers", |v| pattern(v, number))
                .unwrap_or_default(),
            layers_to_transform: keys
                .read("layers_to_transform", "a layer or a list of layers", |v| match v {
                    Value::Array(items) => items.iter().map(whole).collect(),
                    one => Some(vec![whole(one)?]),
                })
                .filter(|layers: &Vec<usize>| !layers.is_empty()), // [] means all, as in PEFT
            layers_pattern: keys
                .read("layers_pattern", "a string or a list of strings", |v| match modules(v)? {
                    Modules::Expression(one) if one.is_empty() => Some(Vec::new()),
                    Modules::Expression(one) => Some(vec![one]),
                    Modules::List(many) => Some(many),
                })
                .unwrap_or_default(),
            use_rslora: keys.read("use_rslora", "true or false", Value::as_bool).unwrap_or(false),
            use_dora: keys.read("use_dora", "true or false", Value::as_bool).unwrap_or(false),
            init_lora_weights: keys
                .read("init_lora_weights", INIT_NEEDED, init)
                .unwrap_or(default.init_lora_weights),
            modules_to_save: keys
                .read("modules_to_save", SAVED_NEEDED, |v| {
                    let names = match modules(v)? {
                        Modules::Expression(one) if one.is_empty() => Vec::new(),
                        Modules::Expression(one) => vec![one],
                        Modules::List(many) => many,
                    };
                    names.iter().all(|name| is_savable(name)).then_some(names)
                })
                .unwrap_or_default(),
            trainable_token_indices,
            head_token_indices,
            inference_mode: keys
                .read("inference_mode", "true or false", Value::as_bool)
                .unwrap_or(false),
        };
        if is_true(map.get("ensure_weight_tying")) && config.names_embeddings() {
            keys.problems.push(TYING.into());
        }
        let mut problems = keys.problems;
        if let Err(ConfigError::Keys(more)) = config.validate() {
            problems.extend(more);
        }
        if problems.is_empty() { Ok(config) } else { Err(ConfigError::Keys(problems)) }
    }

    /// Checks what PEFT checks when it creates a config.
    ///
    /// # Errors
    /// With a clause for each wrong key.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut problems = Vec::new();
        let mut need = |holds: bool, problem: String| {
            if !holds {
                problems.push(problem);
            }
        };
        let ranks = self.rank_pattern.iter().map(|(key, r)| (format!("rank_pattern {key:?}"), r));
        for (key, r) in ranks.chain([("r".into(), &self.r)]) {
            need((1..=MAX_R).contains(r), format!("{key}: found {r}, needed 1 to {MAX_R}"));
        }
        let alphas =
            self.alpha_pattern.iter().map(|(key, a)| (format!("alpha_pattern {key:?}"), a));
        for (key, a) in alphas.chain([("lora_alpha".into(), &self.lora_alpha)]) {
            need(a.is_finite(), format!("{key}: found {a}, needed a finite number"));
        }
        for name in &self.modules_to_save {
            let problem = format!("modules_to_save: found {name:?}, needed {SAVED_NEEDED}");
            need(is_savable(name), problem);
        }
        let lists = [(&self.trainable_token_indices, EMBEDDING), (&self.head_token_indices, HEAD)];
        for (tokens, module) in lists {
            let mut rising = tokens.clone();
            rising.sort_unstable();
            if let Some(twice) = rising.windows(2).find(|pair| pair[0] == pair[1]) {
                need(false, format!("trainable_token_indices: token {} appears twice", twice[0]));
            }
            let holds = tokens.is_empty() || !self.saved_modules().any(|saved| saved == module);
            let name = module.rsplit('.').next().unwrap_or(module);
            let problem = format!(
                "trainable_token_indices beside modules_to_save {name}: needed one of them"
            );
            need(holds, problem);
        }
        let p = self.lora_dropout;
        need((0.0..1.0).contains(&p), format!("lora_dropout: found {p}, needed 0 <= p < 1"));
        if let Some(Modules::Expression(_)) = self.target_modules {
            let problem = "layers_to_transform and layers_pattern need target_modules as a list";
            let layers = self.layers_to_transform.is_some() || !self.layers_pattern.is_empty();
            need(!layers, problem.into());
        } else {
            let holds = self.layers_pattern.is_empty() || self.layers_to_transform.is_some();
            need(holds, "layers_pattern needs layers_to_transform beside it".into());
        }
        if problems.is_empty() { Ok(()) } else { Err(ConfigError::Keys(problems)) }
    }

    /// The paths of the modules trained as a whole, without a score head: [`EMBEDDING`], [`HEAD`].
    pub fn saved_modules(&self) -> impl Iterator<Item = &'static str> {
        let is_meant = |path: &&str| self.modules_to_save.iter().any(|name| is_end(path, name));
        [EMBEDDING, HEAD].into_iter().filter(is_meant)
    }

    /// The config of an adapter after its initialization.
    pub(crate) fn as_plain(&self) -> Self {
        let init_lora_weights = match &self.init_lora_weights {
            InitLoraWeights::Loftq => InitLoraWeights::KaimingUniform,
            other => other.clone(),
        };
        Self { init_lora_weights, ..self.clone() }
    }

    /// The config of an adapter of twice the rank and the same scale, as PEFT's conversion of PiSSA
    /// and OLoRA writes it.
    pub(crate) fn doubled(&self) -> Result<Self, ConfigError> {
        let factor = if self.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
        let ranks = self.rank_pattern.iter().map(|(key, r)| (key.clone(), 2 * r));
        let alphas = self.alpha_pattern.iter().map(|(key, alpha)| (key.clone(), alpha * factor));
        let doubled = Self {
            init_lora_weights: InitLoraWeights::KaimingUniform,
            r: 2 * self.r,
            lora_alpha: self.lora_alpha * factor,
            rank_pattern: ranks.collect(),
            alpha_pattern: alphas.collect(),
            ..self.clone()
        };
        doubled.validate()?;
        Ok(doubled)
    }

    /// Whether there is a score head.
    pub(crate) fn has_score(&self) -> bool {
        self.modules_to_save.iter().any(|module| module == SCORE)
    }

    /// Whether the names include the embedding or the head.
    fn names_embeddings(&self) -> bool {
        let targets = match &self.target_modules {
            None => Vec::new(),
            Some(Modules::Expression(one)) => vec![one.as_str()],
            Some(Modules::List(many)) => many.iter().map(String::as_str).collect(),
        };
        let named = |name: &&str| name.contains("embed_tokens") || name.contains(HEAD);
        self.saved_modules().next().is_some() || targets.iter().any(named)
    }

    /// The text of an `adapter_config.json`, keys in PEFT's order. Patterns keep the order they
    /// have here, since the first that matches counts.
    pub fn to_json(&self) -> String {
        let text = |s: &Option<String>| s.clone().map_or(Value::Null, Value::String);
        let list = |items: &[String]| Value::from(items.to_vec());
        let modules = |m: &Option<Modules>| match m {
            None => Value::Null,
            Some(Modules::Expression(e)) => Value::from(e.clone()),
            Some(Modules::List(items)) => list(items),
        };
        let alphas = self.alpha_pattern.iter().map(|(key, a)| (key.clone(), plain_number(*a)));
        let ranks = self.rank_pattern.iter().map(|(key, r)| (key.clone(), Value::from(*r)));
        let init = match &self.init_lora_weights {
            InitLoraWeights::KaimingUniform => Value::from(true),
            InitLoraWeights::Random => Value::from(false),
            named => Value::from(named.to_string()),
        };
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| map.insert(key.into(), value);
        put("alpha_pattern", Value::Object(alphas.collect()));
        put("base_model_name_or_path", text(&self.base_model_name_or_path));
        put("bias", "none".into());
        put("exclude_modules", modules(&self.exclude_modules));
        put("fan_in_fan_out", false.into());
        put("inference_mode", self.inference_mode.into());
        put("init_lora_weights", init);
        let pattern =
            if self.layers_pattern.is_empty() { Value::Null } else { list(&self.layers_pattern) };
        put("layers_pattern", pattern);
        put("layers_to_transform", self.layers_to_transform.clone().into());
        put("lora_alpha", plain_number(self.lora_alpha));
        put("lora_dropout", plain_number(self.lora_dropout));
        let saved = &self.modules_to_save;
        put("modules_to_save", if saved.is_empty() { Value::Null } else { list(saved) });
        put("peft_type", "LORA".into());
        put("r", self.r.into());
        put("rank_pattern", Value::Object(ranks.collect()));
        put("revision", text(&self.revision));
        put("target_modules", modules(&self.target_modules));
        put("task_type", text(&self.task_type));
        let (tokens, of_head) = (&self.trainable_token_indices, &self.head_token_indices);
        let indices = match (tokens.is_empty(), of_head.is_empty()) {
            (true, true) => Value::Null,
            (false, true) => tokens.clone().into(),
            (true, false) => json!({ "lm_head": of_head }),
            (false, false) => json!({ "embed_tokens": tokens, "lm_head": of_head }),
        };
        put("trainable_token_indices", indices);
        put("use_dora", self.use_dora.into());
        put("use_rslora", self.use_rslora.into());
        format!("{:#}\n", Value::Object(map))
    }
}

/// Reads keys and remembers everything that is wrong with them.
struct KeyReader<'a> {
    map: &'a Map<String, Value>,
    problems: Vec<String>,
}

impl KeyReader<'_> {
    /// The key's value, or `None` where it is absent, null or, then noted, not what is needed.
    fn read<T>(
        &mut self,
        key: &str,
        needed: &str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.map.get(key).filter(|v| !v.is_null())?;
        let converted = convert(value);
        if converted.is_none() {
            self.reject(key, value, needed);
        }
        converted
    }

    fn reject(&mut self, key: &str, found: &Value, needed: &str) {
        let mut found = found.to_string();
        if found.chars().count() > 60 {
            found = found.chars().take(60).chain("...".chars()).collect();
        }
        self.problems.push(format!("{key}: found {found}, needed {needed}"));
    }
}

/// What Python calls false.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(b) => !b,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
    }
}

fn whole(value: &Value) -> Option<usize> {
    usize::try_from(value.as_u64()?).ok()
}

fn number(value: &Value) -> Option<f64> {
    value.as_f64().filter(|v| v.is_finite())
}

fn modules(value: &Value) -> Option<Modules> {
    match value {
        Value::String(s) => Some(Modules::Expression(s.clone())),
        Value::Array(items) => {
            let names: Option<Vec<String>> =
                items.iter().map(|item| item.as_str().map(String::from)).collect();
            names.map(Modules::List)
        }
        _ => None,
    }
}

fn pattern<T>(value: &Value, convert: fn(&Value) -> Option<T>) -> Option<Vec<(String, T)>> {
    value.as_object()?.iter().map(|(key, v)| Some((key.clone(), convert(v)?))).collect()
}

const INIT_NEEDED: &str = "true, false, \"gaussian\", \"pissa\", \"pissa_niter_N\", \"olora\" or \"loftq\": others are not supported";
const SAVED_NEEDED: &str = "score, embed_tokens or lm_head: no other module is supported";
const TOKENS_NEEDED: &str =
    "a list of token ids, or such lists in an object {\"embed_tokens\": [...], \"lm_head\": [...]}";
const TYING: &str = "ensure_weight_tying: found true, needed false: embedding and head are trained apart, or by trainable_token_indices together";

/// PEFT's name.
impl std::fmt::Display for InitLoraWeights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::KaimingUniform => f.write_str("true"),
            Self::Random => f.write_str("false"),
            Self::Gaussian => f.write_str("gaussian"),
            Self::Pissa { niter: None } => f.write_str("pissa"),
            Self::Pissa { niter: Some(niter) } => write!(f, "pissa_niter_{niter}"),
            Self::Olora => f.write_str("olora"),
            Self::Loftq => f.write_str("loftq"),
            Self::Stored(name) => f.write_str(name),
        }
    }
}

impl InitLoraWeights {
    /// Whether an adapter initialized in this way has twice the rank, with the second half frozen.
    pub fn freezes_ranks(&self) -> bool {
        matches!(self, Self::Pissa { .. } | Self::Olora)
    }

    /// The initialization with this name, if it is implemented.
    pub fn from_name(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "true" => Some(Self::KaimingUniform),
            "false" => Some(Self::Random),
            "gaussian" => Some(Self::Gaussian),
            "pissa" => Some(Self::Pissa { niter: None }),
            "olora" => Some(Self::Olora),
            "loftq" => Some(Self::Loftq),
            other => {
                let niter = other.strip_prefix("pissa_niter_")?.parse().ok()?;
                Some(Self::Pissa { niter: Some(niter) })
            }
        }
    }
}

fn init(value: &Value) -> Option<InitLoraWeights> {
    match value {
        Value::Bool(true) => Some(InitLoraWeights::KaimingUniform),
        Value::Bool(false) => Some(InitLoraWeights::Random),
        // CorDA, LoRA-GA and others change the base's weights when PEFT loads the adapter, by data
        // that is not in the file.
        Value::String(s) if s == "eva" || s == "orthogonal" => {
            Some(InitLoraWeights::Stored(s.clone()))
        }
        Value::String(s) if s != "true" && s != "false" => InitLoraWeights::from_name(s),
        _ => None,
    }
}

fn is_savable(name: &str) -> bool {
    [SCORE, CLASSIFIER].contains(&name) || [EMBEDDING, HEAD].iter().any(|path| is_end(path, name))
}

/// Whether `name` is the path or what follows a dot in it.
fn is_end(path: &str, name: &str) -> bool {
    path == name || path.strip_suffix(name).is_some_and(|start| start.ends_with('.'))
}

/// A list of tokens, or such lists by module: those of the embedding, and those of the head for itself.
fn token_indices(value: &Value) -> Option<[Vec<u32>; 2]> {
    let list = |value: &Value| -> Option<Vec<u32>> {
        let token = |item: &Value| u32::try_from(item.as_u64()?).ok();
        value.as_array()?.iter().map(token).collect()
    };
    let Value::Object(modules) = value else { return Some([list(value)?, Vec::new()]) };
    let mut tokens = [Vec::new(), Vec::new()];
    for (name, value) in modules {
        let of = [EMBEDDING, HEAD].iter().position(|path| is_end(path, name))?;
        tokens[of] = list(value)?;
    }
    Some(tokens)
}

fn is_true(value: Option<&Value>) -> bool {
    value.is_some_and(|value| value == &Value::Bool(true))
}

/// A whole number without a point: PEFT's `lora_alpha` is an int to most readers.
fn plain_number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 2f64.powi(53) {
        Value::from(value as i64)
    } else {
        Number::from_f64(value).map_or(Value::Null, Value::Number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_config_reads_back() {
        let full = LoraConfig {
            task_type: Some("CAUSAL_LM".into()),
            base_model_name_or_path: Some("a/b".into()),
            revision: Some("main".into()),
            r: 4,
            lora_alpha: 0.5,
            lora_dropout: 0.125,
            target_modules: Some(Modules::List(vec!["q_proj".into(), "v_proj".into()])),
            exclude_modules: Some(Modules::Expression(".*0.*".into())),
            rank_pattern: vec![("z".into(), 2), ("a".into(), 3)],
            alpha_pattern: vec![("z".into(), 2.0), ("a".into(), 1.5)],
            layers_to_transform: Some(vec![1, 2]),
            layers_pattern: vec!["layers".into()],
            use_rslora: true,
            use_dora: true,
            init_lora_weights: InitLoraWeights::Gaussian,
            inference_mode: true,
            modules_to_save: vec!["score".into(), "lm_head".into()],
            trainable_token_indices: vec![7, 2],
            head_token_indices: Vec::new(),
        };
        let of_head = LoraConfig { head_token_indices: vec![3], ..LoraConfig::default() };
        let apart = LoraConfig { trainable_token_indices: vec![3, 4], ..of_head.clone() };
        let with_init =
            |init_lora_weights| LoraConfig { init_lora_weights, ..LoraConfig::default() };
        let pissa = |niter| with_init(InitLoraWeights::Pissa { niter });
        let named = [with_init(InitLoraWeights::Olora), with_init(InitLoraWeights::Loftq)];
        let written = [LoraConfig::default(), full, pissa(None), pissa(Some(16)), of_head, apart];
        for config in written.into_iter().chain(named) {
            assert_eq!(LoraConfig::from_json(&config.to_json()).unwrap(), config);
        }
        let text = LoraConfig::default().to_json();
        assert!(text.contains("\"lora_alpha\": 8,"), "{text}");
    }

    #[test]
    fn config_errors_are_reported_together() {
        let check = |text: &str, needed: &[&str]| {
            let error = LoraConfig::from_json(text).unwrap_err().to_string();
            for part in needed {
                assert!(error.contains(part), "{error:?} should name {part:?}");
            }
            assert_eq!(error.matches("; ").count() + 1, needed.len(), "{error}");
        };
        check("[1]", &["found [1], needed an object"]);
        check("{", &["EOF"]);
        check("{}", &["peft_type is missing"]);
        check(
            r#"{"peft_type": "ADALORA", "use_dora": 1, "bias": "all",
                "modules_to_save": ["embed_tokens", "norm"], "trainable_token_indices": [-1],
                "target_parameters": ["x"], "fan_in_fan_out": true,
                "megatron_config": {"a": 1}, "alora_invocation_tokens": [2], "lora_bias": true}"#,
            &[
                "peft_type: found \"ADALORA\"",
                "bias: found \"all\"",
                "use_dora: found 1, needed true or false",
                "lora_bias",
                "fan_in_fan_out",
                "modules_to_save: found [\"embed_tokens\",\"norm\"], needed score, embed_tokens or lm_head",
                "trainable_token_indices: found [-1], needed a list",
                "target_parameters",
                "megatron_config",
                "alora_invocation_tokens",
            ],
        );
        check(
            r#"{"peft_type": "LORA", "r": 0, "lora_alpha": "x", "lora_dropout": 1,
                "target_modules": [1], "rank_pattern": {"q": 0.5}, "init_lora_weights": "corda",
                "layers_to_transform": -1, "layers_pattern": "layers"}"#,
            &[
                "lora_alpha: found \"x\", needed a number",
                "target_modules: found [1]",
                "rank_pattern: found {\"q\":0.5}",
                "layers_to_transform: found -1",
                "init_lora_weights: found \"corda\"",
                "r: found 0, needed 1 to 65536",
                "lora_dropout: found 1, needed 0 <= p < 1",
                "layers_pattern needs layers_to_transform",
            ],
        );
        check(
            r#"{"peft_type": "LORA", "target_modules": "all-linear", "layers_to_transform": [0]}"#,
            &["need target_modules as a list"],
        );
        check(
            r#"{"peft_type": "LORA", "trainable_token_indices": [3, 1, 3],
                "modules_to_save": ["model.embed_tokens"], "ensure_weight_tying": true}"#,
            &["token 3 appears twice", "needed one of them", "ensure_weight_tying: found true"],
        );
    }

    #[test]
    fn unknown_keys_and_nulls_are_ignored() {
        let text = r#"{"peft_type": "LORA", "new_in_2030": {"a": 1.5}, "r": null, "use_dora": false,
            "loftq_config": {}, "lora_alpha": 16.5, "layers_to_transform": [], "bias": null}"#;
        let config = LoraConfig::from_json(text).unwrap();
        assert_eq!(config, LoraConfig { lora_alpha: 16.5, ..LoraConfig::default() });
    }

    #[test]
    fn modules_to_save_and_token_indices_follow_peft() {
        let check = |text: &str, saved: &[&str], tokens: &[u32], of_head: &[u32]| {
            let text = format!(r#"{{"peft_type": "LORA", {text}}}"#);
            let config = LoraConfig::from_json(&text).unwrap();
            assert_eq!(config.saved_modules().collect::<Vec<_>>(), saved, "{text}");
            assert_eq!(config.trainable_token_indices, tokens, "{text}");
            assert_eq!(config.head_token_indices, of_head, "{text}");
        };
        let both = r#""modules_to_save": ["lm_head", "model.embed_tokens"]"#;
        check(both, &[EMBEDDING, HEAD], &[], &[]);
        let scored = r#""modules_to_save": ["score", "classifier", "embed_tokens"]"#;
        check(scored, &[EMBEDDING], &[], &[]);
        check(r#""trainable_token_indices": [5, 1]"#, &[], &[5, 1], &[]);
        check(r#""trainable_token_indices": {"embed_tokens": [1, 2]}"#, &[], &[1, 2], &[]);
        let apart = r#""trainable_token_indices": {"lm_head": [4], "embed_tokens": [3, 4]}"#;
        check(apart, &[], &[3, 4], &[4]);
        check(r#""trainable_token_indices": {"lm_head": [4]}"#, &[], &[], &[4]);
        check(r#""trainable_token_indices": {}, "ensure_weight_tying": true"#, &[], &[], &[]);
        for refused in [r#"{"norm": [4]}"#, r#"{"embed_tokens": [1], "lm_head": 2}"#, "7"] {
            let text = format!(r#"{{"peft_type": "LORA", "trainable_token_indices": {refused}}}"#);
            let error = LoraConfig::from_json(&text).unwrap_err().to_string();
            assert!(error.contains("trainable_token_indices: found"), "{error}");
        }
    }
}
