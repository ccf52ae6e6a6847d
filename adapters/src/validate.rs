//! Whether an adapter fits a base: every tensor's shape against the base's linear layers, and whether
//! all its numbers are finite. Readers of files and the registry use the same check.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Storage, Var};

use crate::config::{EMBEDDING, HEAD};
use crate::delta::{
    Adapter, HEAD_TOKEN_ROWS, Lora, TOKEN_ROWS, TokenRows, magnitude_name, saved_name, score_name,
    tensor_name, token_rows_name,
};
use crate::targets::LinearSpec;

impl Adapter {
    /// Why this adapter cannot be used on a base with these linear layers, a clause for each tensor that
    /// does not fit; empty if it fits.
    ///
    /// Checked are the factors A `(r, in)` and B `(out, r)` and DoRA's magnitudes `(out)` of each
    /// module, modules trained whole `(vocab_size, hidden_size)`, token rows
    /// `(tokens, hidden_size)` with their tokens, and the score head `(1, hidden_size)`; all are F32.
    pub fn mismatches(&self, linears: &[LinearSpec]) -> Vec<String> {
        let base =
            Base { linears: linears.iter().map(|spec| (spec.name.as_str(), spec)).collect() };
        let mut problems = Vec::new();
        for (module, lora) in &self.modules {
            match base.linears.get(module.as_str()) {
                None => problems.push(format!("{module} is not a linear layer of this base")),
                Some(spec) => check_update(spec, lora, &mut problems),
            }
        }
        for (module, weight) in &self.saved {
            let name = saved_name(module);
            match base.weight_shape(module) {
                None => problems.push(format!("{name}: this base has no {module}")),
                Some(shape) => check_tensor(&name, weight, &shape, &mut problems),
            }
        }
        let rows =
            [(EMBEDDING, TOKEN_ROWS, &self.tokens), (HEAD, HEAD_TOKEN_ROWS, &self.head_tokens)];
        for (module, parameter, rows) in rows {
            if let Some(rows) = rows {
                base.check_token_rows(module, &token_rows_name(parameter), rows, &mut problems);
            }
        }
        if let Some(score) = &self.score {
            match base.hidden_size() {
                Some(hidden) => check_tensor(&score_name(), score, &[1, hidden], &mut problems),
                None => problems.push(format!("{}: this base has no {EMBEDDING}", score_name())),
            }
        }
        problems
    }

    /// The names of the tensors with numbers that are NaN or infinite, or that cannot be read.
    pub fn non_finite_tensors(&self) -> Vec<String> {
        let broken = self.parameters().into_iter().filter(|(_, var)| !is_finite(var));
        broken.map(|(name, _)| name).collect()
    }
}

/// A base's linear layers by module path.
struct Base<'a> {
    linears: BTreeMap<&'a str, &'a LinearSpec>,
}

impl Base<'_> {
    /// The shape of a module's weight as files store it: `(vocab_size, hidden_size)` of embedding and head.
    fn weight_shape(&self, module: &str) -> Option<[usize; 2]> {
        self.linears.get(module).map(|spec| {
            if spec.embedding {
                [spec.in_features, spec.out_features]
            } else {
                [spec.out_features, spec.in_features]
            }
        })
    }

    fn hidden_size(&self) -> Option<usize> {
        let [_, hidden_size] = self.weight_shape(EMBEDDING).or(self.weight_shape(HEAD))?;
        Some(hidden_size)
    }

    fn check_token_rows(
        &self,
        module: &str,
        name: &str,
        rows: &TokenRows,
        problems: &mut Vec<String>,
    ) {
        let Some([vocab_size, hidden_size]) = self.weight_shape(module) else {
            problems.push(format!("{name}: this base has no {module}"));
            return;
        };
        check_tensor(name, &rows.rows, &[rows.indices.len(), hidden_size], problems);
        if let Some(token) = rows.indices.iter().find(|token| **token as usize >= vocab_size) {
            problems.push(format!("{name}: token {token}, needed less than {vocab_size}"));
        }
        if let Some(pair) = rows.indices.windows(2).find(|pair| pair[0] >= pair[1]) {
            let [one, next] = [pair[0], pair[1]];
            problems.push(format!("{name}: token {next} after {one}, needed rising tokens"));
        }
    }
}

fn check_update(spec: &LinearSpec, lora: &Lora, problems: &mut Vec<String>) {
    let module = spec.name.as_str();
    let (a, b) = (lora.a.dims(), lora.b.dims());
    // B's columns give the rank if A has no rows.
    let r = a.first().or(b.last()).copied().unwrap_or(0);
    if r == 0 {
        problems.push(format!("{}: rank 0, needed at least 1", tensor_name(module, 'A')));
    }
    if lora.frozen_ranks > r {
        let frozen = lora.frozen_ranks;
        problems.push(format!("{module}: {frozen} frozen ranks, needed at most its rank {r}"));
    }
    check_tensor(&tensor_name(module, 'A'), &lora.a, &[r, spec.in_features], problems);
    check_tensor(&tensor_name(module, 'B'), &lora.b, &[spec.out_features, r], problems);
    if let Some(magnitude) = &lora.magnitude {
        let name = magnitude_name(module);
        check_tensor(&name, &magnitude.vector, &[spec.out_features], problems);
    }
    if !lora.scale.is_finite() {
        problems.push(format!("{module}: scale {}, needed a finite number", lora.scale));
    }
}

fn check_tensor(name: &str, var: &Var, needed: &[usize], problems: &mut Vec<String>) {
    if var.dims() != needed {
        problems.push(format!("{name} is {:?}, needed {needed:?}", var.dims()));
    }
    if var.dtype() != DType::F32 {
        problems.push(format!("{name} is {:?}, needed F32", var.dtype()));
    }
}

/// Whether a tensor can be read as F32 and none of its numbers is NaN or infinite.
fn is_finite(var: &Var) -> bool {
    let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
    let Ok(flat) = var.as_detached_tensor().to_device(&Device::Cpu).and_then(|t| t.flatten_all())
    else {
        return false;
    };
    let (storage, layout) = flat.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => {
            storage.as_slice::<f32>().is_ok_and(|values| finite(&values[start..end]))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LoraConfig;
    use crate::delta::Magnitude;
    use crate::targets::Target;

    fn spec(name: &str, in_features: usize, out_features: usize) -> LinearSpec {
        let embedding = name == EMBEDDING;
        LinearSpec { name: name.into(), in_features, out_features, embedding, added_tokens: 0 }
    }

    /// A base of 12 tokens and hidden size 8.
    fn base() -> Vec<LinearSpec> {
        vec![spec(EMBEDDING, 12, 8), spec("q", 8, 6), spec(HEAD, 8, 12)]
    }

    fn var(shape: &[usize]) -> Var {
        Var::zeros(shape, DType::F32, &Device::Cpu).unwrap()
    }

    fn token_rows(indices: &[u32], shape: &[usize]) -> Option<TokenRows> {
        Some(TokenRows { indices: indices.to_vec(), rows: var(shape) })
    }

    /// An adapter of every kind of tensor, which fits [`base`].
    fn adapter() -> Adapter {
        let targets = base().into_iter().map(|spec| Target { spec, r: 2, scale: 0.5 });
        let targets: Vec<Target> = targets.collect();
        let config = LoraConfig::default();
        let mut adapter = Adapter::new("all", config, &targets, 1, &Device::Cpu).unwrap();
        let q = adapter.modules.get_mut("q").unwrap();
        q.magnitude = Some(Magnitude::new(var(&[6])));
        for module in [EMBEDDING, HEAD] {
            adapter.saved.insert(module.into(), var(&[12, 8]));
        }
        adapter.tokens = token_rows(&[3, 11], &[2, 8]);
        adapter.head_tokens = token_rows(&[0], &[1, 8]);
        adapter.score = Some(var(&[1, 8]));
        adapter
    }

    fn check(change: impl Fn(&mut Adapter), needed: &[&str]) {
        let mut adapter = adapter();
        change(&mut adapter);
        assert_eq!(adapter.mismatches(&base()), needed);
    }

    fn lora<'a>(adapter: &'a mut Adapter, module: &str) -> &'a mut Lora {
        adapter.modules.get_mut(module).unwrap()
    }

    #[test]
    fn fitting_adapter_has_no_mismatches() {
        check(|_| {}, &[]);
        assert_eq!(adapter().non_finite_tensors(), [""; 0]);
    }

    #[test]
    fn factors_are_checked_for_shape() {
        check(
            |a| lora(a, "q").a = var(&[2, 9]),
            &["base_model.model.q.lora_A.weight is [2, 9], needed [2, 8]"],
        );
        check(
            |a| lora(a, "q").b = var(&[6, 3]),
            &["base_model.model.q.lora_B.weight is [6, 3], needed [6, 2]"],
        );
        check(
            |a| lora(a, "q").a = var(&[2]),
            &["base_model.model.q.lora_A.weight is [2], needed [2, 8]"],
        );
        check(|a| lora(a, "q").frozen_ranks = 3, &["q: 3 frozen ranks, needed at most its rank 2"]);
        check(|a| lora(a, "q").scale = f64::NAN, &["q: scale NaN, needed a finite number"]);
        let zero = |a: &mut Adapter| {
            (lora(a, "q").a, lora(a, "q").b) = (var(&[0, 8]), var(&[6, 0]));
        };
        check(zero, &["base_model.model.q.lora_A.weight: rank 0, needed at least 1"]);
    }

    #[test]
    fn updates_of_embedding_and_head_are_checked_for_shape() {
        check(
            |a| lora(a, EMBEDDING).a = var(&[2, 13]),
            &["base_model.model.model.embed_tokens.lora_embedding_A is [2, 13], needed [2, 12]"],
        );
        check(
            |a| lora(a, HEAD).b = var(&[11, 2]),
            &["base_model.model.lm_head.lora_B.weight is [11, 2], needed [12, 2]"],
        );
    }

    #[test]
    fn magnitudes_are_checked_for_shape() {
        check(
            |a| lora(a, "q").magnitude = Some(Magnitude::new(var(&[5]))),
            &["base_model.model.q.lora_magnitude_vector is [5], needed [6]"],
        );
    }

    #[test]
    fn saved_modules_are_checked_for_shape() {
        check(
            |a| drop(a.saved.insert(EMBEDDING.into(), var(&[8, 12]))),
            &["base_model.model.model.embed_tokens.weight is [8, 12], needed [12, 8]"],
        );
        check(
            |a| drop(a.saved.insert("norm".into(), var(&[8]))),
            &["base_model.model.norm.weight: this base has no norm"],
        );
    }

    #[test]
    fn token_rows_are_checked_for_shape_and_tokens() {
        const EMBED: &str =
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta";
        const OF_HEAD: &str = "base_model.model.lm_head.token_adapter.trainable_tokens_delta";
        let check = |change: &dyn Fn(&mut Adapter), needed: String| check(change, &[&needed]);
        check(
            &|a| a.tokens = token_rows(&[3, 11], &[2, 7]),
            format!("{EMBED} is [2, 7], needed [2, 8]"),
        );
        check(
            &|a| a.tokens = token_rows(&[3, 12], &[2, 8]),
            format!("{EMBED}: token 12, needed less than 12"),
        );
        check(
            &|a| a.head_tokens = token_rows(&[5, 4], &[2, 8]),
            format!("{OF_HEAD}: token 4 after 5, needed rising tokens"),
        );
        check(
            &|a| a.head_tokens = token_rows(&[4], &[2, 8]),
            format!("{OF_HEAD} is [2, 8], needed [1, 8]"),
        );
    }

    #[test]
    fn score_head_is_checked_for_shape() {
        check(
            |a| a.score = Some(var(&[1, 9])),
            &["base_model.model.score.weight is [1, 9], needed [1, 8]"],
        );
    }

    #[test]
    fn all_mismatches_are_reported() {
        let mut adapter = adapter();
        adapter.score = Some(Var::zeros((1, 8), DType::F16, &Device::Cpu).unwrap());
        lora(&mut adapter, "q").a = var(&[2, 9]);
        let other = Lora::new(var(&[2, 8]), var(&[8, 2]), 1.0);
        adapter.modules.insert("v".into(), other);
        let needed = [
            "base_model.model.q.lora_A.weight is [2, 9], needed [2, 8]",
            "v is not a linear layer of this base",
            "base_model.model.score.weight is F16, needed F32",
        ];
        assert_eq!(adapter.mismatches(&base()), needed);
    }

    /// One number of each tensor in turn becomes NaN or infinite.
    #[test]
    fn every_tensor_is_checked_for_finite_numbers() {
        for (value, at) in [(f32::NAN, 0), (f32::INFINITY, 3), (f32::NEG_INFINITY, 5)] {
            for i in 0..adapter().parameters().len() {
                let adapter = adapter();
                let (name, var) = &adapter.parameters()[i];
                let mut values: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
                values[at] = value;
                let values = candle_core::Tensor::from_vec(values, var.shape(), &Device::Cpu);
                var.set(&values.unwrap()).unwrap();
                assert_eq!(adapter.non_finite_tensors(), [name.as_str()]);
            }
        }
    }
}
