//! Which linear layers of a base an adapter config targets, with rank and scale, by PEFT's rules.
//!
//! A list names modules by their whole path or by what follows a dot in it; a string is a regular
//! expression over the whole path; `all-linear` is every linear layer but the output head.
//! Only linear layers and the token embedding are candidates here: an expression that also matches other
//! modules, on which PEFT fails, selects these.

use fancy_regex::Regex;

use crate::config::{EMBEDDING, HEAD, LoraConfig, Modules};

/// A linear layer of a base, `y (out_features) = W x (in_features)`, or its token embedding: a linear
/// layer of one-hot vectors whose weight is stored transposed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearSpec {
    /// Its Hugging Face module path, like `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Columns of `W`.
    pub in_features: usize,
    /// Rows of `W`.
    pub out_features: usize,
    /// Whether it is the token embedding, whose base weight has `in_features` rows.
    pub embedding: bool,
    /// Of embedding and head, how many of the tokens were added to the base's vocabulary, at its end.
    /// Adapters trained before that have no values for them.
    pub added_tokens: usize,
}

/// A linear layer that gets an update.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// The layer.
    pub spec: LinearSpec,
    /// Rank of its update.
    pub r: usize,
    /// The factor of its update: `lora_alpha / r`, or `lora_alpha / sqrt(r)`.
    pub scale: f64,
}

/// The modules that a config selects on a base.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// The targets, in the base's order; at least one.
    pub targets: Vec<Target>,
    /// The modules trained as a whole, without a score head.
    pub saved: Vec<LinearSpec>,
    /// The token embedding, if some of its rows are trained (`trainable_token_indices`).
    pub tokens: Option<LinearSpec>,
    /// The untied head, if some of its rows are trained.
    pub head_tokens: Option<LinearSpec>,
    /// Names and patterns that match no module although others do, for warnings.
    pub unmatched: Vec<Unmatched>,
}

/// A name or pattern of a config that no module matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmatched {
    /// `target_modules`, `rank_pattern` or `alpha_pattern`.
    pub key: &'static str,
    /// The name or pattern.
    pub pattern: String,
}

impl std::fmt::Display for Unmatched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} matches no module", self.key, self.pattern)
    }
}

/// Why a config does not fit a base.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// No `target_modules`.
    #[error(
        "target_modules is null, needed module names, an expression or \"all-linear\"; this base has {known}"
    )]
    NoTargets {
        /// The last parts of the base's module paths.
        known: String,
    },
    /// Nothing matches.
    #[error("target_modules {target} matches no linear layer; this base has {known}")]
    NoMatch {
        /// The requested value.
        target: String,
        /// The last parts of the base's module paths.
        known: String,
    },
    /// Everything that matches is excluded.
    #[error("exclude_modules {exclude} leaves none of the {matched} layers of target_modules")]
    AllExcluded {
        /// What was excluded.
        exclude: String,
        /// How many layers there were without it.
        matched: usize,
    },
    /// A module of `modules_to_save` or `trainable_token_indices` that the base does not have.
    #[error("{key} needs {module}, which this base does not have; it has {known}")]
    NoModule {
        /// The config's key.
        key: &'static str,
        /// The module's path.
        module: String,
        /// The last parts of the base's module paths.
        known: String,
    },
    /// A module that is trained in two ways.
    #[error("{module} is a target and in {key} too: needed one of them")]
    Twice {
        /// The config's key.
        key: &'static str,
        /// The module's path.
        module: String,
    },
    /// DoRA on a module that cannot have it.
    #[error(
        "use_dora with target {0}: needed other targets, DoRA is for the layers' own linear modules"
    )]
    Dora(String),
    /// A token outside of the vocabulary.
    #[error(
        "trainable_token_indices: found {token}, needed less than {vocab_size}, the size of the vocabulary (tokens that were added are there where the base is loaded with the adapter and its tokenizer.json)"
    )]
    Token {
        /// The requested value.
        token: u32,
        /// How many tokens the embedding has.
        vocab_size: usize,
    },
    /// A regular expression that is invalid, or takes too long.
    #[error("{key}: {pattern:?} is not a usable regular expression: {reason}")]
    Expression {
        /// The config's key.
        key: &'static str,
        /// The expression.
        pattern: String,
        /// The parser's or matcher's reason.
        reason: String,
    },
}

/// Finds the modules among `linears` that `config` selects. `head` is the output head's name, which
/// `all-linear` excludes.
///
/// Rank and alpha come from the first pattern that matches the end of the module's path, the
/// scale is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
///
/// # Errors
/// If nothing matches, a module is missing or selected twice, or an expression is invalid.
pub fn resolve(
    config: &LoraConfig,
    linears: &[LinearSpec],
    head: Option<&str>,
) -> Result<Resolved, TargetError> {
    let Some(wanted) = &config.target_modules else {
        return Err(TargetError::NoTargets { known: known(linears) });
    };
    let mut matched: Vec<&LinearSpec> = match wanted {
        Modules::Expression(e) if e.eq_ignore_ascii_case("all-linear") => {
            linears.iter().filter(|l| !l.embedding && Some(l.name.as_str()) != head).collect()
        }
        Modules::Expression(e) => {
            let expression = Pattern::whole("target_modules", e)?;
            keep(linears.iter(), |name| expression.matches(name))?
        }
        Modules::List(names) => {
            let layers = Layers::new(config)?;
            keep(linears.iter(), |name| {
                Ok(names.iter().any(|n| n == name)
                    || (names.iter().any(|n| ends_with(name, n)) && layers.hold(name)?))
            })?
        }
    };
    if matched.is_empty() {
        let target = describe(wanted);
        return Err(TargetError::NoMatch { target, known: known(linears) });
    }
    let before = matched.len();
    match &config.exclude_modules {
        Some(Modules::Expression(e)) if !e.is_empty() => {
            let expression = Pattern::whole("exclude_modules", e)?;
            matched = keep(matched.into_iter(), |name| Ok(!expression.matches(name)?))?;
        }
        Some(Modules::List(names)) => {
            matched.retain(|l| !names.iter().any(|n| *n == l.name || ends_with(&l.name, n)));
        }
        Some(Modules::Expression(_)) | None => {}
    }
    if matched.is_empty()
        && let Some(exclude) = &config.exclude_modules
    {
        return Err(TargetError::AllExcluded { exclude: describe(exclude), matched: before });
    }

    if config.use_dora
        && let Some(spec) = matched.iter().find(|l| l.embedding || Some(l.name.as_str()) == head)
    {
        return Err(TargetError::Dora(spec.name.clone()));
    }
    let other = |key: &'static str, module: &str| {
        if matched.iter().any(|l| l.name == module) {
            return Err(TargetError::Twice { key, module: module.into() });
        }
        let found = linears.iter().find(|l| l.name == module).cloned();
        let known = || known(linears);
        found.ok_or_else(|| TargetError::NoModule { key, module: module.into(), known: known() })
    };
    let saved = config.saved_modules().map(|module| other("modules_to_save", module));
    let saved = saved.collect::<Result<Vec<_>, _>>()?;
    let rows_of = |indices: &[u32], module: &str| {
        if indices.is_empty() {
            return Ok(None);
        }
        let spec = other("trainable_token_indices", module)?;
        let vocab_size = if spec.embedding { spec.in_features } else { spec.out_features };
        match indices.iter().find(|&&token| token as usize >= vocab_size) {
            Some(&token) => Err(TargetError::Token { token, vocab_size }),
            None => Ok(Some(spec)),
        }
    };
    let tokens = rows_of(&config.trainable_token_indices, EMBEDDING)?;
    let head_tokens = rows_of(&config.head_token_indices, HEAD)?;

    let ranks = Patterns::new("rank_pattern", &config.rank_pattern)?;
    let alphas = Patterns::new("alpha_pattern", &config.alpha_pattern)?;
    let mut targets = Vec::with_capacity(matched.len());
    for spec in matched {
        let r = ranks.get(&spec.name)?.unwrap_or(config.r);
        let alpha = alphas.get(&spec.name)?.unwrap_or(config.lora_alpha);
        let scale = if config.use_rslora { alpha / (r as f64).sqrt() } else { alpha / r as f64 };
        targets.push(Target { spec: spec.clone(), r, scale });
    }

    let mut unmatched = Vec::new();
    if let Modules::List(names) = wanted {
        let lost = |n: &&String| !linears.iter().any(|l| l.name == **n || ends_with(&l.name, n));
        let lost = names.iter().filter(lost).cloned();
        unmatched.extend(lost.map(|pattern| Unmatched { key: "target_modules", pattern }));
    }
    unmatched.extend(ranks.unmatched(&targets)?);
    unmatched.extend(alphas.unmatched(&targets)?);
    Ok(Resolved { targets, saved, tokens, head_tokens, unmatched })
}

/// `layers_to_transform` and `layers_pattern`.
struct Layers<'a> {
    layers: Option<&'a [usize]>,
    /// Each captures a layer's number; the first that matches a path counts.
    patterns: Vec<Pattern>,
}

impl<'a> Layers<'a> {
    fn new(config: &'a LoraConfig) -> Result<Self, TargetError> {
        let patterns = if config.layers_pattern.is_empty() {
            // The first number after a dot: in a mixture of experts the layer's, not the expert's.
            vec![Pattern::new("layers_pattern", "", r"\A(?:.*?\.[^.]*\.(?P<idx>\d+)\.)".into())?]
        } else {
            let full = |p: &String| format!(r"\A(?:(?:^|.*?\.){p}\.(?P<idx>\d+)\.)");
            let patterns = config.layers_pattern.iter();
            patterns
                .map(|p| Pattern::new("layers_pattern", p, full(p)))
                .collect::<Result<_, _>>()?
        };
        Ok(Self { layers: config.layers_to_transform.as_deref(), patterns })
    }

    fn hold(&self, name: &str) -> Result<bool, TargetError> {
        let Some(layers) = self.layers else { return Ok(true) };
        for pattern in &self.patterns {
            let captures = pattern.regex.captures(name).map_err(|e| pattern.error(&e))?;
            if let Some(captures) = captures {
                let layer = captures.name("idx").and_then(|layer| layer.as_str().parse().ok());
                return Ok(layer.is_some_and(|layer: usize| layers.contains(&layer)));
            }
        }
        Ok(false)
    }
}

/// `rank_pattern` or `alpha_pattern`.
struct Patterns<T> {
    key: &'static str,
    items: Vec<(Pattern, T)>,
}

impl<T: Copy> Patterns<T> {
    fn new(key: &'static str, items: &[(String, T)]) -> Result<Self, TargetError> {
        let full = |p: &String| format!(r"\A(?:.*\.)?(?:{p})\z");
        let items = items.iter().map(|(p, value)| Ok((Pattern::new(key, p, full(p))?, *value)));
        Ok(Self { key, items: items.collect::<Result<_, TargetError>>()? })
    }

    /// The value of the first pattern that matches; else of a pattern that equals the name.
    fn get(&self, name: &str) -> Result<Option<T>, TargetError> {
        for (pattern, value) in &self.items {
            if pattern.matches(name)? {
                return Ok(Some(*value));
            }
        }
        Ok(self.items.iter().find(|(pattern, _)| pattern.source == name).map(|(_, value)| *value))
    }

    fn unmatched(&self, targets: &[Target]) -> Result<Vec<Unmatched>, TargetError> {
        let mut unmatched = Vec::new();
        for (pattern, _) in &self.items {
            if keep(targets.iter().map(|t| &t.spec), |name| pattern.matches(name))?.is_empty() {
                unmatched.push(Unmatched { key: self.key, pattern: pattern.source.clone() });
            }
        }
        Ok(unmatched)
    }
}

/// A regular expression with its source, for error messages.
struct Pattern {
    key: &'static str,
    source: String,
    regex: Regex,
}

impl Pattern {
    /// An expression that must match a whole path.
    fn whole(key: &'static str, source: &str) -> Result<Self, TargetError> {
        Self::new(key, source, source.into())?; // `a)|(b` is an expression only between our own
        Self::new(key, source, format!(r"\A(?:{source})\z"))
    }

    fn new(key: &'static str, source: &str, full: String) -> Result<Self, TargetError> {
        let source = source.to_string();
        match Regex::new(&full) {
            Ok(regex) => Ok(Self { key, source, regex }),
            Err(e) => Err(TargetError::Expression { key, pattern: source, reason: e.to_string() }),
        }
    }

    fn matches(&self, name: &str) -> Result<bool, TargetError> {
        self.regex.is_match(name).map_err(|e| self.error(&e))
    }

    fn error(&self, reason: &fancy_regex::Error) -> TargetError {
        let (key, pattern) = (self.key, self.source.clone());
        TargetError::Expression { key, pattern, reason: reason.to_string() }
    }
}

fn keep<'a>(
    specs: impl Iterator<Item = &'a LinearSpec>,
    holds: impl Fn(&str) -> Result<bool, TargetError>,
) -> Result<Vec<&'a LinearSpec>, TargetError> {
    let mut kept = Vec::new();
    for spec in specs {
        if holds(&spec.name)? {
            kept.push(spec);
        }
    }
    Ok(kept)
}

/// Whether `name` ends in `.end`.
fn ends_with(name: &str, end: &str) -> bool {
    name.strip_suffix(end).is_some_and(|start| start.ends_with('.'))
}

fn describe(modules: &Modules) -> String {
    match modules {
        Modules::Expression(e) => format!("{e:?}"),
        Modules::List(names) => format!("{names:?}"),
    }
}

/// The last components of the module paths, without duplicates, in the base's order.
fn known(linears: &[LinearSpec]) -> String {
    let mut ends: Vec<&str> = Vec::new();
    for end in linears.iter().filter_map(|l| l.name.rsplit('.').next()) {
        if !ends.contains(&end) {
            ends.push(end);
        }
    }
    if ends.is_empty() { "no linear layers".into() } else { ends.join(", ") }
}
