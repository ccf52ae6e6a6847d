//! Swaps adapters on one base while it is in memory: `cargo run --example swap_adapter`.
//!
//! The base is never changed; an adapter is an argument of each call.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use quantune::model::adapter_files::open_adapter;
use quantune::model::{ActiveAdapter, Adapters, Decoder, Rows};
use quantune::ops::Compute;
use quantune::weights::Checkpoint;
use quantune_adapters::registry::{Registry, RegistryLimits};

fn main() -> Result<(), Box<dyn Error>> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let checkpoint = Checkpoint::open(golden.join("model/llama-tiny"))?;
    let decoder = Decoder::load(&checkpoint, Compute::F32)?;

    // A registry holds adapters by name; other threads may add and remove some meanwhile.
    let registry = Registry::new(&decoder.linears(), RegistryLimits::default());
    for name in ["initial", "final"] {
        let folder = golden.join("train/llama-tiny").join(name);
        let (adapter, _unmatched) = open_adapter(&folder, name, &decoder)?;
        registry.insert(name, Arc::new(adapter))?;
    }

    let tokens = [1u32, 5, 9, 3];
    let first_logit = |adapters: Adapters| -> Result<f32, Box<dyn Error>> {
        let hidden = decoder.hidden(&Rows::new(&[tokens]), adapters)?;
        let logits = decoder.logits(&hidden, adapters)?;
        Ok(logits.flatten_all()?.to_vec1::<f32>()?[0])
    };
    println!("bare base: {}", first_logit(Adapters::NONE)?);
    for name in ["initial", "final", "initial"] {
        let active = [ActiveAdapter::frozen(registry.get(name)?)];
        println!("{name}: {}", first_logit(Adapters::Same(&active))?);
    }
    registry.remove("final")?;
    println!("registered: {:?}", registry.list().iter().map(|e| &e.name).collect::<Vec<_>>());
    Ok(())
}
