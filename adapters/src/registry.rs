//! Named adapters for one base, loaded and dropped while others use them.
//!
//! [`Registry::get`] returns a snapshot: its holder keeps that adapter, whatever is loaded under its
//! name or dropped meanwhile, and the memory is freed with the last holder.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::delta::Adapter;
use crate::targets::LinearSpec;

/// Adapters by name, shared by any number of threads.
#[derive(Debug)]
pub struct Registry {
    /// The base's linear layers.
    base: Vec<LinearSpec>,
    limits: RegistryLimits,
    adapters: RwLock<BTreeMap<String, Arc<Adapter>>>,
}

/// How much a registry may hold. Adapters that were dropped and are still in use do not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RegistryLimits {
    /// Number of adapters.
    pub adapters: Option<usize>,
    /// Bytes of their parameters, 4 each.
    pub bytes: Option<usize>,
}

/// One adapter in [`Registry::list`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryEntry {
    /// Its name in the registry.
    pub name: String,
    /// Number of modules with an update.
    pub modules: usize,
    /// Bytes of its parameters, 4 each.
    pub bytes: usize,
}

/// Why an operation on a registry failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// No adapter of that name.
    #[error("no adapter is named {name:?}{}", loaded(.known))]
    UnknownName {
        /// The name.
        name: String,
        /// All names in the registry.
        known: Vec<String>,
    },
    /// Another adapter has the name.
    #[error("an adapter is named {0:?} already: drop it first, or use another name")]
    NameTaken(String),
    /// A name that a chat command could not tell from its other parts.
    #[error(
        "invalid adapter name {0:?}, needed at least one character, no whitespace and no '=', and not \
         \"off\""
    )]
    InvalidName(String),
    /// Tensors that do not fit the base, or hold numbers that are not finite.
    #[error("adapter {name:?} cannot be used on this base: {}", problems.join("; "))]
    Invalid {
        /// The adapter.
        name: String,
        /// A clause for each tensor, shapes first.
        problems: Vec<String>,
    },
    /// The adapter would exceed a limit.
    #[error("adapter {name:?} does not fit: {needed} {what} with it, the registry holds {limit}")]
    LimitExceeded {
        /// The adapter.
        name: String,
        /// "adapters" or "bytes".
        what: &'static str,
        /// How many there would be.
        needed: usize,
        /// How many there may be.
        limit: usize,
    },
}

fn loaded(names: &[String]) -> String {
    match names {
        [] => ": none is loaded".into(),
        names => format!(", loaded are {}", names.join(", ")),
    }
}

impl Registry {
    /// An empty registry for a base with these linear layers, embedding and head included.
    pub fn new(base: &[LinearSpec], limits: RegistryLimits) -> Self {
        Self { base: base.to_vec(), limits, adapters: RwLock::default() }
    }

    /// Adds an adapter under a new name.
    ///
    /// # Errors
    /// If the name is invalid or taken, a tensor does not fit the base or holds numbers that are not
    /// finite, or a limit would be exceeded.
    pub fn insert(&self, name: &str, adapter: Arc<Adapter>) -> Result<(), RegistryError> {
        self.put(name, adapter, |adapters| {
            if adapters.contains_key(name) {
                return Err(RegistryError::NameTaken(name.into()));
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Replaces the adapter of a name, and returns the previous one.
    ///
    /// # Errors
    /// If there is no adapter of that name, and as [`Self::insert`].
    pub fn replace(
        &self,
        name: &str,
        adapter: Arc<Adapter>,
    ) -> Result<Arc<Adapter>, RegistryError> {
        let old = self.put(name, adapter, |adapters| {
            if !adapters.contains_key(name) {
                return Err(unknown(name, adapters));
            }
            Ok(())
        })?;
        Ok(old.expect("there was one to replace"))
    }

    /// Removes an adapter and returns it. Holders of a snapshot keep using it.
    ///
    /// # Errors
    /// If there is no adapter of that name.
    pub fn remove(&self, name: &str) -> Result<Arc<Adapter>, RegistryError> {
        let mut adapters = self.adapters.write().unwrap_or_else(PoisonError::into_inner);
        adapters.remove(name).ok_or_else(|| unknown(name, &adapters))
    }

    /// A snapshot of the adapter of a name.
    ///
    /// # Errors
    /// If there is no adapter of that name.
    pub fn get(&self, name: &str) -> Result<Arc<Adapter>, RegistryError> {
        let adapters = self.adapters.read().unwrap_or_else(PoisonError::into_inner);
        adapters.get(name).cloned().ok_or_else(|| unknown(name, &adapters))
    }

    /// All adapters, sorted by name.
    pub fn list(&self) -> Vec<RegistryEntry> {
        let adapters = self.adapters.read().unwrap_or_else(PoisonError::into_inner);
        let entry = |(name, adapter): (&String, &Arc<Adapter>)| RegistryEntry {
            name: name.clone(),
            modules: adapter.modules.len(),
            bytes: bytes(adapter),
        };
        adapters.iter().map(entry).collect()
    }

    fn put(
        &self,
        name: &str,
        adapter: Arc<Adapter>,
        check_name: impl FnOnce(&BTreeMap<String, Arc<Adapter>>) -> Result<(), RegistryError>,
    ) -> Result<Option<Arc<Adapter>>, RegistryError> {
        if name.is_empty()
            || name == "off"
            || name.contains(|c: char| c.is_whitespace() || c == '=')
        {
            return Err(RegistryError::InvalidName(name.into()));
        }
        let mut problems = adapter.mismatches(&self.base);
        let broken = adapter.non_finite_tensors().into_iter();
        problems.extend(broken.map(|tensor| format!("{tensor} holds NaN or infinite numbers")));
        if !problems.is_empty() {
            return Err(RegistryError::Invalid { name: name.into(), problems });
        }
        let mut adapters = self.adapters.write().unwrap_or_else(PoisonError::into_inner);
        check_name(&adapters)?;
        let others = || adapters.iter().filter(|(other, _)| *other != name);
        let needed = [
            ("adapters", others().count() + 1, self.limits.adapters),
            (
                "bytes",
                others().map(|(_, adapter)| bytes(adapter)).sum::<usize>() + bytes(&adapter),
                self.limits.bytes,
            ),
        ];
        for (what, needed, limit) in needed {
            if let Some(limit) = limit.filter(|limit| needed > *limit) {
                return Err(RegistryError::LimitExceeded {
                    name: name.into(),
                    what,
                    needed,
                    limit,
                });
            }
        }
        Ok(adapters.insert(name.into(), adapter))
    }
}

fn unknown(name: &str, adapters: &BTreeMap<String, Arc<Adapter>>) -> RegistryError {
    RegistryError::UnknownName { name: name.into(), known: adapters.keys().cloned().collect() }
}

/// Bytes of an adapter's parameters, which are F32.
fn bytes(adapter: &Adapter) -> usize {
    adapter.num_parameters() * size_of::<f32>()
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;
    use std::sync::atomic::{AtomicBool, Ordering};

    use candle_core::Device;

    use super::*;
    use crate::config::LoraConfig;
    use crate::targets::Target;

    fn spec(name: &str, rows: usize) -> LinearSpec {
        let (name, added_tokens) = (name.into(), 0);
        LinearSpec { name, in_features: 8, out_features: rows, embedding: false, added_tokens }
    }

    /// An adapter of `r · (8 + rows)` numbers, whose name is its content.
    fn adapter(name: &str, module: &str, rows: usize, r: usize) -> Arc<Adapter> {
        let targets = [Target { spec: spec(module, rows), r, scale: 1.0 }];
        let made = Adapter::new(name, LoraConfig::default(), &targets, 1, &Device::Cpu);
        Arc::new(made.unwrap())
    }

    fn registry(limits: RegistryLimits) -> Registry {
        Registry::new(&[spec("q", 8), spec("v", 4)], limits)
    }

    #[test]
    fn adapters_are_inserted_replaced_and_removed() {
        let registry = registry(RegistryLimits::default());
        let one = || adapter("one", "q", 8, 1);
        registry.insert("a", one()).unwrap();
        let held = registry.get("a").unwrap();
        let old = registry.replace("a", adapter("two", "v", 4, 2)).unwrap();
        assert!(Arc::ptr_eq(&held, &old));
        assert_eq!(registry.get("a").unwrap().name, "two");
        registry.insert("b", one()).unwrap();
        let listed = |name: &str, bytes| RegistryEntry { name: name.into(), modules: 1, bytes };
        assert_eq!(registry.list(), [listed("a", 96), listed("b", 64)]);
        assert_eq!(registry.remove("a").unwrap().name, "two");
        assert_eq!(registry.list(), [listed("b", 64)]);
    }

    #[test]
    fn errors_name_adapter_and_reason() {
        let limits = RegistryLimits { adapters: Some(2), bytes: Some(200) };
        let registry = registry(limits);
        let check = |result: Result<(), RegistryError>, needed: &str| {
            assert_eq!(result.unwrap_err().to_string(), needed);
        };
        let one = || adapter("one", "q", 8, 1);
        let missing = |registry: &Registry| registry.get("c").map(|_| ());
        check(missing(&registry), "no adapter is named \"c\": none is loaded");
        registry.insert("a", one()).unwrap();
        check(
            registry.insert("b", adapter("large", "q", 8, 3)),
            "adapter \"b\" does not fit: 256 bytes with it, the registry holds 200",
        );
        registry.insert("b", one()).unwrap();
        check(missing(&registry), "no adapter is named \"c\", loaded are a, b");
        check(
            registry.insert("c", one()),
            "adapter \"c\" does not fit: 3 adapters with it, the registry holds 2",
        );
        check(
            registry.insert("a", one()),
            "an adapter is named \"a\" already: drop it first, or use another name",
        );
        check(
            registry.replace("c", one()).map(|_| ()),
            "no adapter is named \"c\", loaded are a, b",
        );
        check(registry.remove("c").map(|_| ()), "no adapter is named \"c\", loaded are a, b");
        check(
            registry.replace("a", adapter("other", "k", 8, 1)).map(|_| ()),
            "adapter \"a\" cannot be used on this base: k is not a linear layer of this base",
        );
        check(
            registry.replace("a", adapter("other", "q", 9, 1)).map(|_| ()),
            "adapter \"a\" cannot be used on this base: base_model.model.q.lora_B.weight is [9, 1], \
             needed [8, 1]",
        );
        let broken = adapter("broken", "q", 8, 1);
        let b = &broken.modules["q"].b;
        b.set(&(b.ones_like().unwrap() / 0.0).unwrap()).unwrap();
        check(
            registry.replace("a", broken).map(|_| ()),
            "adapter \"a\" cannot be used on this base: base_model.model.q.lora_B.weight holds NaN or \
             infinite numbers",
        );
        for name in ["", "a b", "a=b", "off"] {
            let refused = registry.insert(name, one());
            assert!(matches!(refused, Err(RegistryError::InvalidName(_))), "{name:?}");
        }
        // One that replaces another counts in its place.
        registry.replace("a", adapter("larger", "q", 8, 2)).unwrap();
    }

    /// A mismatch of shape and a NaN are reported together.
    #[test]
    fn invalid_adapter_is_rejected_with_all_problems() {
        let mut adapter = Arc::into_inner(adapter("a", "q", 9, 1)).unwrap();
        adapter.score = Some(candle_core::Var::new(&[[f32::NAN]], &Device::Cpu).unwrap());
        let error = registry(RegistryLimits::default()).insert("a", Arc::new(adapter)).unwrap_err();
        let RegistryError::Invalid { problems, .. } = error else { panic!("{error}") };
        let needed = [
            "base_model.model.q.lora_B.weight is [9, 1], needed [8, 1]",
            "base_model.model.score.weight: this base has no model.embed_tokens",
            "base_model.model.score.weight holds NaN or infinite numbers",
        ];
        assert_eq!(problems, needed);
    }

    /// Readers see whole adapters while writers replace them, and dropped adapters are freed.
    #[test]
    fn replacing_is_atomic_for_concurrent_readers() {
        let registry = registry(RegistryLimits::default());
        registry.insert("kept", adapter("0", "q", 8, 1)).unwrap();
        let done = AtomicBool::new(false);
        let mut dropped: Vec<Weak<Adapter>> = Vec::new();
        std::thread::scope(|scope| {
            let getters: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        let (mut got, mut last) = (0, 0);
                        while !done.load(Ordering::Acquire) || got == 0 {
                            let kept: usize = registry.get("kept").unwrap().name.parse().unwrap();
                            assert!(kept >= last, "{kept} after {last}");
                            last = kept;
                            if let Ok(passing) = registry.get("passing") {
                                assert_eq!(passing.name, "passing");
                            }
                            assert!(registry.list().len() <= 2);
                            got += 1;
                        }
                    })
                })
                .collect();
            for round in 1..=500 {
                let new = adapter(&round.to_string(), "q", 8, 1);
                dropped.push(Arc::downgrade(&registry.replace("kept", new).unwrap()));
                registry.insert("passing", adapter("passing", "v", 4, 1)).unwrap();
                dropped.push(Arc::downgrade(&registry.remove("passing").unwrap()));
            }
            done.store(true, Ordering::Release);
            getters.into_iter().for_each(|getter| getter.join().unwrap());
        });
        assert!(dropped.iter().all(|adapter| adapter.upgrade().is_none()));
        assert_eq!(registry.get("kept").unwrap().name, "500");
    }
}
