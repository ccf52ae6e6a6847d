//! Trains a LoRA adapter: `cargo run --example fine_tune [MODEL] [ROWS.jsonl]`.
//!
//! Without arguments, a few steps on a tiny model of the tests, with rows written here.

use std::error::Error;
use std::sync::atomic::AtomicBool;

use quantune::monitor::{LogEvent, Monitor};
use quantune::train::{Command, Outcome, RunSettings, train};

fn main() -> Result<(), Box<dyn Error>> {
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/model/llama-tiny");
    let folder = std::env::temp_dir().join(format!("quantune-fine-tune-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let rows = folder.join("rows.jsonl");
    let row = |i: usize| format!("{{\"prompt\": \"Say {i}: \", \"completion\": \"{i}\"}}\n");
    std::fs::write(&rows, (0..20).map(row).collect::<String>())?;
    let mut args = std::env::args().skip(1);

    // Names are those of PEFT and TRL; every setting has a default.
    let mut settings = RunSettings::new(Command::Sft);
    settings.common.base = args.next().unwrap_or_else(|| tiny.into()).into();
    settings.common.data = vec![args.next().map_or(rows, Into::into).into()];
    settings.common.out = folder.join("run");
    settings.common.r = 8;
    settings.common.max_steps = 4;
    settings.common.max_length = 64;
    settings.common.optimizer.learning_rate = 1e-3;

    // The library prints nothing: a monitor receives events, and can stop the run.
    let stop = AtomicBool::new(false);
    let listener = |event: LogEvent| match event {
        LogEvent::Warning(text) => eprintln!("warning: {text}"),
        LogEvent::Step { step, total_steps, headline, .. } => {
            eprintln!("step {step} of {total_steps}: {headline}");
        }
        _ => {}
    };
    match train(&settings, false, Monitor::new(&stop, &listener))? {
        Outcome::Done(summary) => println!("adapter: {}", summary.adapter.display()),
        _ => println!("stopped"),
    }
    Ok(std::fs::remove_dir_all(&folder)?)
}
