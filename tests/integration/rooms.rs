//! The order of the rooms, held to what the sources say.

use std::fs;
use std::path::{Path, PathBuf};

const ROOMS: &[&str] = &[
    "isa",
    "monitor",
    "string_enum",
    "quant",
    "ops",
    "weights",
    "text",
    "data",
    "optim",
    "model",
    "generate",
    "objectives",
    "rollout",
    "eval",
    "export",
    "train",
    "cli",
];

fn sources(folder: &Path) -> Vec<PathBuf> {
    if !folder.is_dir() {
        return vec![folder.with_extension("rs")]; // a room of one file
    }
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files = Vec::new();
    for path in entries {
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn a_room_uses_only_rooms_above_it() {
    let order = |room: &str| ROOMS.iter().position(|r| *r == room);
    let mut faults = Vec::new();
    for (level, room) in ROOMS.iter().enumerate() {
        for file in sources(&root().join("src").join(room)) {
            let text = fs::read_to_string(&file).unwrap();
            for used in text.split("crate::").skip(1) {
                let used: String = used.chars().take_while(|c| c.is_alphanumeric()).collect();
                if order(&used).is_some_and(|used| used > level) {
                    faults.push(format!("{} uses {used}", file.display()));
                }
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
    let map = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let listed: Vec<&str> =
        map.split("//! - [`").skip(1).filter_map(|line| line.split('`').next()).collect();
    assert_eq!(listed, ROOMS, "the map in lib.rs is another");
}

#[test]
fn candle_calls_that_drop_gradients_stay_in_ops() {
    let traps = [
        "QMatMul",
        "softmax_last_dim",
        "ops::rms_norm(",
        "ops::layer_norm",
        "candle_nn::rotary_emb",
        "candle_nn::RmsNorm",
        "ops::sdpa",
        "op1_no_bwd",
        "op2_no_bwd",
        "op3_no_bwd",
    ];
    for file in sources(&root().join("src")) {
        if file.starts_with(root().join("src/ops")) {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        for trap in traps {
            assert!(
                !text.contains(&format!("candle_nn::{trap}")) && !text.contains(trap)
                    || trap.starts_with("ops::"),
                "{} has {trap}",
                file.display()
            );
        }
    }
}
