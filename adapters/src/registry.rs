//! Named adapters for one base, loaded and dropped while others use them.
//!
//! What is got from the registry is a snapshot: whoever holds it keeps that adapter, whatever is
//! loaded under its name or dropped meanwhile, and its memory goes with the last one who does.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use candle_core::Var;

use crate::delta::Adapter;
use crate::targets::LinearSpec;

/// Adapters by name, for any number of threads.
#[derive(Debug)]
pub struct Registry {
    /// The base's linear layers by name, as rows and columns.
    base: BTreeMap<String, (usize, usize)>,
    limits: RegistryLimits,
    adapters: RwLock<BTreeMap<String, Arc<Adapter>>>,
}

/// How much a registry may hold. Adapters that were dropped, and are still active, do not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RegistryLimits {
    /// Adapters.
    pub adapters: Option<usize>,
    /// Bytes of their numbers, 4 each.
    pub bytes: Option<usize>,
}

/// What a registry says of an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryEntry {
    /// What it is called here.
    pub name: String,
    /// Modules it sits on.
    pub modules: usize,
    /// Bytes of its numbers, 4 each.
    pub bytes: usize,
}

/// Why a registry refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// No adapter of that name.
    #[error("no adapter is called {name:?}{}", among(.known))]
    Unknown {
        /// The name.
        name: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// Another adapter has the name.
    #[error("an adapter is called {0:?} already: drop it first, or take another name")]
    Taken(String),
    /// A name nobody could tell from the rest of a command.
    #[error(
        "an adapter's name is {0:?}, needed at least one character, none of them a space or a '=', \
         and not \"off\""
    )]
    Name(String),
    /// An adapter of another base.
    #[error("adapter {name:?} is for another base: {reason}")]
    Base {
        /// The adapter.
        name: String,
        /// The first module that does not fit.
        reason: String,
    },
    /// An adapter that would make nonsense of every row it is active on.
    #[error("adapter {name:?} has numbers that are not finite, in {module}: it is broken")]
    Broken {
        /// The adapter.
        name: String,
        /// The first such module.
        module: String,
    },
    /// A bound would be passed.
    #[error("adapter {name:?} does not fit: {needed} {what} with it, the registry holds {limit}")]
    Full {
        /// The adapter.
        name: String,
        /// Adapters or bytes.
        what: &'static str,
        /// How many there would be.
        needed: usize,
        /// How many there may be.
        limit: usize,
    },
}

fn among(names: &[String]) -> String {
    match names {
        [] => ": none is loaded".into(),
        names => format!(", loaded are {}", names.join(", ")),
    }
}

impl Registry {
    /// An empty registry for a base with these linear layers.
    pub fn new(base: &[LinearSpec], limits: RegistryLimits) -> Self {
        let shape = |spec: &LinearSpec| (spec.out_features, spec.in_features);
        let base = base.iter().map(|spec| (spec.name.clone(), shape(spec))).collect();
        Self { base, limits, adapters: RwLock::default() }
    }

    /// Takes an adapter in under a new name.
    pub fn insert(&self, name: &str, adapter: Arc<Adapter>) -> Result<(), RegistryError> {
        self.put(name, adapter, |adapters| match adapters.contains_key(name) {
            true => Err(RegistryError::Taken(name.into())),
            false => Ok(()),
        })?;
        Ok(())
    }

    /// Puts an adapter in the place of another, which is given back.
    pub fn replace(
        &self,
        name: &str,
        adapter: Arc<Adapter>,
    ) -> Result<Arc<Adapter>, RegistryError> {
        let old = self.put(name, adapter, |adapters| match adapters.contains_key(name) {
            true => Ok(()),
            false => Err(unknown(name, adapters)),
        })?;
        Ok(old.expect("there was one to replace"))
    }

    /// Drops an adapter, which is given back. Whoever wears it goes on wearing it.
    pub fn remove(&self, name: &str) -> Result<Arc<Adapter>, RegistryError> {
        let mut adapters = self.adapters.write().unwrap_or_else(PoisonError::into_inner);
        adapters.remove(name).ok_or_else(|| unknown(name, &adapters))
    }

    /// The adapter of a name as it is now.
    pub fn get(&self, name: &str) -> Result<Arc<Adapter>, RegistryError> {
        let adapters = self.adapters.read().unwrap_or_else(PoisonError::into_inner);
        adapters.get(name).cloned().ok_or_else(|| unknown(name, &adapters))
    }

    /// All adapters, by name.
    pub fn list(&self) -> Vec<RegistryEntry> {
        let adapters = self.adapters.read().unwrap_or_else(PoisonError::into_inner);
        let listed = |(name, adapter): (&String, &Arc<Adapter>)| RegistryEntry {
            name: name.clone(),
            modules: adapter.modules.len(),
            bytes: bytes(adapter),
        };
        adapters.iter().map(listed).collect()
    }

    fn put(
        &self,
        name: &str,
        adapter: Arc<Adapter>,
        may: impl FnOnce(&BTreeMap<String, Arc<Adapter>>) -> Result<(), RegistryError>,
    ) -> Result<Option<Arc<Adapter>>, RegistryError> {
        if name.is_empty()
            || name == "off"
            || name.contains(|c: char| c.is_whitespace() || c == '=')
        {
            return Err(RegistryError::Name(name.into()));
        }
        self.check_base(name, &adapter)?;
        let broken =
            adapter.modules.iter().find(|(_, lora)| ![&lora.a, &lora.b].into_iter().all(is_finite));
        if let Some((module, _)) = broken {
            return Err(RegistryError::Broken { name: name.into(), module: module.clone() });
        }
        let mut adapters = self.adapters.write().unwrap_or_else(PoisonError::into_inner);
        may(&adapters)?;
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
                return Err(RegistryError::Full { name: name.into(), what, needed, limit });
            }
        }
        Ok(adapters.insert(name.into(), adapter))
    }

    fn check_base(&self, name: &str, adapter: &Adapter) -> Result<(), RegistryError> {
        let fault = |reason| RegistryError::Base { name: name.into(), reason };
        for (module, lora) in &adapter.modules {
            let found = (lora.out_features(), lora.in_features());
            match self.base.get(module) {
                None => return Err(fault(format!("it sits on {module}, which this one lacks"))),
                Some(needed) if *needed != found => {
                    let reason = format!("{module} is {found:?}, needed {needed:?}");
                    return Err(fault(reason));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }
}

fn unknown(name: &str, adapters: &BTreeMap<String, Arc<Adapter>>) -> RegistryError {
    RegistryError::Unknown { name: name.into(), known: adapters.keys().cloned().collect() }
}

/// Whether all numbers are there and none is NaN or infinite.
fn is_finite(var: &Var) -> bool {
    let values = var.as_detached_tensor().flatten_all().and_then(|t| t.to_vec1::<f32>());
    values.is_ok_and(|values| values.iter().all(|x| x.is_finite()))
}

/// Bytes of an adapter's numbers, which are F32.
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
    fn adapters_come_and_go_by_name() {
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
    fn refusals_are_sentences() {
        let limits = RegistryLimits { adapters: Some(2), bytes: Some(200) };
        let registry = registry(limits);
        let check = |result: Result<(), RegistryError>, needed: &str| {
            assert_eq!(result.unwrap_err().to_string(), needed);
        };
        let one = || adapter("one", "q", 8, 1);
        let missing = |registry: &Registry| registry.get("c").map(|_| ());
        check(missing(&registry), "no adapter is called \"c\": none is loaded");
        registry.insert("a", one()).unwrap();
        check(
            registry.insert("b", adapter("large", "q", 8, 3)),
            "adapter \"b\" does not fit: 256 bytes with it, the registry holds 200",
        );
        registry.insert("b", one()).unwrap();
        check(missing(&registry), "no adapter is called \"c\", loaded are a, b");
        check(
            registry.insert("c", one()),
            "adapter \"c\" does not fit: 3 adapters with it, the registry holds 2",
        );
        check(
            registry.insert("a", one()),
            "an adapter is called \"a\" already: drop it first, or take another name",
        );
        check(
            registry.replace("c", one()).map(|_| ()),
            "no adapter is called \"c\", loaded are a, b",
        );
        check(registry.remove("c").map(|_| ()), "no adapter is called \"c\", loaded are a, b");
        check(
            registry.replace("a", adapter("other", "k", 8, 1)).map(|_| ()),
            "adapter \"a\" is for another base: it sits on k, which this one lacks",
        );
        check(
            registry.replace("a", adapter("other", "q", 9, 1)).map(|_| ()),
            "adapter \"a\" is for another base: q is (9, 8), needed (8, 8)",
        );
        let broken = adapter("broken", "q", 8, 1);
        let b = &broken.modules["q"].b;
        b.set(&(b.ones_like().unwrap() / 0.0).unwrap()).unwrap();
        check(
            registry.replace("a", broken).map(|_| ()),
            "adapter \"a\" has numbers that are not finite, in q: it is broken",
        );
        for name in ["", "a b", "a=b", "off"] {
            let refused = registry.insert(name, one());
            assert!(matches!(refused, Err(RegistryError::Name(_))), "{name:?}");
        }
        // One that replaces another counts in its place.
        registry.replace("a", adapter("larger", "q", 8, 2)).unwrap();
    }

    /// Threads that get while others swap see whole adapters, and nothing is left of those dropped.
    #[test]
    fn threads_swap_while_others_get() {
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
