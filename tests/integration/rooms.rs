//! Layering of the rooms (the modules of `src/lib.rs`), checked against the sources: their order, operations
//! that are allowed in only one of them, and dependency cycles of files inside a room. Each rule is a
//! function of one file's text, and a test shows that it finds a planted violation.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Lowest first: a room uses only rooms before it.
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

/// Crates of the command line.
const CLI_CRATES: &[&str] = &["clap", "clap_complete", "ctrlc", "indicatif", "rustyline"];

/// The streams that macros print to, and that can be written to without.
const STREAMS: &[&str] = &["stdout", "stderr"];

/// Macros that print.
const PRINTING: &[&str] = &["print", "println", "eprint", "eprintln", "dbg"];

/// Functions of candle without a backward pass, called on any value.
const DROPS_GRADIENTS: &[&str] =
    &["QMatMul", "softmax_last_dim", "apply_op1_no_bwd", "apply_op2_no_bwd", "apply_op3_no_bwd"];

/// Functions of candle_nn without a backward pass that have the name of a function of this crate.
const DROPS_GRADIENTS_IN_CANDLE_NN: &[&str] =
    &["rms_norm", "layer_norm", "rotary_emb", "RmsNorm", "sdpa"];

/// A source file without comments and tests.
struct SourceFile {
    /// Relative to `src`, with `/`.
    path: String,
    code: String,
}

impl SourceFile {
    fn new(path: &str, text: &str) -> Self {
        let tests = text.find("\n#[cfg(test)]\nmod tests {").unwrap_or(text.len());
        let lines = text[..tests].lines().map(|line| {
            let comment = line.trim_start().starts_with("//");
            let end = if comment { 0 } else { line.find(" // ").unwrap_or(line.len()) };
            &line[..end]
        });
        Self { path: path.into(), code: lines.collect::<Vec<_>>().join("\n") }
    }

    fn room(&self) -> &str {
        let first = self.path.split('/').next().unwrap();
        first.strip_suffix(".rs").unwrap_or(first)
    }

    fn is_cli(&self) -> bool {
        ["cli", "main"].contains(&self.room())
    }

    /// The identifiers, each with the text directly after it.
    fn words(&self) -> impl Iterator<Item = (&str, &str)> {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let mut rest = &self.code[..];
        std::iter::from_fn(move || {
            let start = rest.find(is_word)?;
            rest = &rest[start..];
            let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            let (word, behind) = rest.split_at(end);
            rest = behind;
            Some((word, behind))
        })
    }

    /// All paths with `::`, those of `use` groups one by one, as segments.
    fn paths(&self) -> Vec<Vec<String>> {
        let mut found = Vec::new();
        let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
        let mut rest = &self.code[..];
        while let Some(start) = rest.find(|c: char| c.is_alphabetic() || c == '_') {
            rest = &rest[start..];
            let end = rest.find(|c| !is_path(c)).unwrap_or(rest.len());
            let (path, behind) = rest.split_at(end);
            rest = behind;
            let segments = |path: &str| -> Vec<String> {
                path.split("::").filter(|part| !part.is_empty()).map(String::from).collect()
            };
            if path.ends_with("::") && behind.starts_with('{') {
                let (group, behind) = group_of(behind);
                rest = behind;
                let inner = SourceFile { path: self.path.clone(), code: group.replace(',', "\n") };
                // Items without `::` are paths too.
                for item in items_of(group) {
                    let mut nested = inner.expand(item);
                    for tail in &mut nested {
                        let mut whole = segments(path);
                        whole.append(tail);
                        found.push(whole);
                    }
                }
            } else if path.contains("::") {
                found.push(segments(path));
            }
        }
        found
    }

    /// One item of a `use` group: a path, or a path with a nested group.
    fn expand(&self, item: &str) -> Vec<Vec<String>> {
        let item = item.trim();
        let item = item.split(" as ").next().unwrap();
        match item.find('{') {
            Some(at) => {
                let prefix: Vec<String> = item[..at]
                    .split("::")
                    .filter(|part| !part.is_empty())
                    .map(|part| part.trim().to_string())
                    .collect();
                let (group, _) = group_of(&item[at..]);
                let tails = items_of(group).into_iter().flat_map(|item| self.expand(item));
                tails.map(|tail| [prefix.clone(), tail].concat()).collect()
            }
            None => vec![item.split("::").map(|part| part.trim().to_string()).collect()],
        }
    }
}

/// The inside of the braces at the start of `text`, and the rest.
fn group_of(text: &str) -> (&str, &str) {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return (&text[1..at], &text[at + 1..]);
        }
    }
    (&text[1..], "")
}

/// The items of a group, between commas that are in no inner group.
fn items_of(group: &str) -> Vec<&str> {
    let (mut items, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                items.push(&group[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    items.push(&group[start..]);
    items.into_iter().filter(|item| !item.trim().is_empty()).collect()
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All sources of the library and the binary, without those of tests alone (`tests.rs`).
fn sources() -> Vec<SourceFile> {
    fn visit(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                visit(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") {
                found.push(path);
            }
        }
    }
    let (src, mut files) = (root().join("src"), Vec::new());
    visit(&src, &mut files);
    files.sort();
    let read = |path: &PathBuf| {
        let relative = path.strip_prefix(&src).unwrap().to_str().unwrap().replace('\\', "/");
        SourceFile::new(&relative, &fs::read_to_string(path).unwrap())
    };
    files.iter().map(read).collect()
}

/// The rooms that a file uses although it must not.
fn rooms_above(file: &SourceFile) -> Vec<String> {
    let order = |room: &str| ROOMS.iter().position(|r| *r == room);
    let Some(level) = order(file.room()) else { return Vec::new() };
    let here = module_of(&file.path);
    let inner = |path: &[String]| !["crate", "super", "self"].contains(&&*path[0]);
    let used = file.paths().into_iter().filter(|path| !inner(path));
    let used = used.filter_map(|path| absolute(&here, &path).first().cloned());
    used.filter(|room| order(room).is_some_and(|used| used > level)).collect()
}

/// A path without `crate`, `super` and `self`, as the module `here` uses it.
fn absolute(here: &[String], path: &[String]) -> Vec<String> {
    let supers = path.iter().take_while(|part| *part == "super").count();
    match &*path[0] {
        "crate" => path[1..].to_vec(),
        "super" => [&here[..here.len().saturating_sub(supers)], &path[supers..]].concat(),
        "self" => [here, &path[1..]].concat(),
        _ => [here, path].concat(),
    }
}

/// Crates of the command line, and printing, outside of it.
fn command_line_outside_cli(file: &SourceFile) -> Vec<String> {
    if file.is_cli() {
        return Vec::new();
    }
    let mut found = Vec::new();
    for (word, behind) in file.words() {
        let prints = PRINTING.contains(&word) && behind.starts_with('!');
        let is_path = behind.starts_with("::") || behind.starts_with(';');
        let is_stream = STREAMS.contains(&word) && behind.starts_with("()");
        if prints || is_stream || (CLI_CRATES.contains(&word) && is_path) {
            found.push(word.to_string());
        }
    }
    found
}

/// Names of model families outside of `model/config`. In `text` the same words name tokenizers.
fn family_names(file: &SourceFile, families: &[String]) -> Vec<String> {
    if file.path.starts_with("model/config") || file.room() == "text" {
        return Vec::new();
    }
    let literals = families.iter().map(|name| format!("\"{name}\""));
    literals.filter(|literal| file.code.contains(literal)).collect()
}

/// Paths with more than one `super`.
fn relative_paths(file: &SourceFile) -> Vec<String> {
    let paths = file.paths().into_iter();
    let climbs =
        paths.filter(|path| path[0] == "super" && path.get(1).is_some_and(|p| p == "super"));
    climbs.map(|path| path.join("::")).collect()
}

/// Operations of candle without a backward pass, outside of `ops`: `backward` returns `Ok` and wrong
/// gradients through them.
fn dropped_gradients(file: &SourceFile) -> Vec<String> {
    if file.room() == "ops" {
        return Vec::new();
    }
    let words = file.words().map(|(word, _)| word).filter(|word| DROPS_GRADIENTS.contains(word));
    let mut found: Vec<String> = words.map(String::from).collect();
    for path in file.paths().into_iter().filter(|path| path[0] == "candle_nn") {
        let dropped = path.iter().any(|part| DROPS_GRADIENTS_IN_CANDLE_NN.contains(&&**part));
        let last = path.last().unwrap();
        if dropped || last == "ops" || last == "*" {
            found.push(path.join("::")); // any function of the module could be called
        }
    }
    found
}

fn check_all(rule: impl Fn(&SourceFile) -> Vec<String>) {
    let mut faults = Vec::new();
    for file in sources() {
        faults.extend(rule(&file).into_iter().map(|fault| format!("{}: {fault}", file.path)));
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

/// The architectures and model types that `model/config/family.rs` lists.
fn families() -> Vec<String> {
    let text = fs::read_to_string(root().join("src/model/config/family.rs")).unwrap();
    let mut names = BTreeSet::new();
    for key in ["architecture: \"", "model_type: \""] {
        let found = text.split(key).skip(1).filter_map(|rest| rest.split('"').next());
        names.extend(found.map(String::from));
    }
    assert!(names.contains("llama") && names.len() > 4, "{names:?}");
    names.into_iter().collect()
}

#[test]
fn rooms_use_only_rooms_below_them() {
    check_all(rooms_above);
    let map = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let listed: Vec<&str> =
        map.split("//! - [`").skip(1).filter_map(|line| line.split('`').next()).collect();
    assert_eq!(listed, ROOMS, "src/lib.rs lists other rooms");
}

#[test]
fn only_cli_prints_and_parses_arguments() {
    check_all(command_line_outside_cli);
}

#[test]
fn family_names_stay_in_model_config() {
    let families = families();
    check_all(|file| family_names(file, &families));
}

#[test]
fn paths_climb_at_most_one_module() {
    check_all(relative_paths);
}

#[test]
fn candle_operations_without_gradients_stay_in_ops() {
    check_all(dropped_gradients);
}

/// Every rule finds planted violations, one for each of its names.
#[test]
fn rules_find_planted_violations() {
    let file = |path: &str, line: &str| SourceFile::new(path, &format!("//! A file.\n\n{line}\n"));
    let finds = |found: Vec<String>, line: &str| assert!(!found.is_empty(), "not found: {line}");
    for line in
        ["use crate::train::Outcome;", "use crate::{isa::Isa, cli::main};", "crate::data::x()"]
    {
        finds(rooms_above(&file("ops/rope.rs", line)), line);
    }
    for line in ["use super::train::Outcome;", "let x = super::data::x();"] {
        finds(rooms_above(&file("isa.rs", line)), line);
        finds(rooms_above(&file("ops/mod.rs", line)), line);
        assert!(rooms_above(&file("cli/mod.rs", line)).is_empty());
    }
    finds(rooms_above(&file("ops/rope.rs", "super::super::data::x()")), "two levels up");
    assert!(rooms_above(&file("ops/rope.rs", "use crate::isa::Isa; // not crate::cli")).is_empty());
    for name in CLI_CRATES {
        for line in [format!("use {name}::Thing;"), format!("use {name};")] {
            finds(command_line_outside_cli(&file("train/run.rs", &line)), &line);
            assert!(command_line_outside_cli(&file("cli/train.rs", &line)).is_empty());
        }
    }
    for name in STREAMS {
        let line = format!("    writeln!(io::{name}(), \"step {{step}}\")");
        finds(command_line_outside_cli(&file("train/run.rs", &line)), &line);
        assert!(command_line_outside_cli(&file("cli/train.rs", &line)).is_empty());
    }
    for name in PRINTING {
        let line = format!("    {name}!(\"step {{step}}\");");
        finds(command_line_outside_cli(&file("train/run.rs", &line)), &line);
        assert!(command_line_outside_cli(&file("main.rs", &line)).is_empty());
    }
    for name in families() {
        let line = format!("if config.family.architecture == \"{name}\" {{");
        finds(family_names(&file("export/types.rs", &line), &families()), &line);
        assert!(family_names(&file("model/config/family.rs", &line), &families()).is_empty());
    }
    let line = "use super::super::TrainError;";
    finds(relative_paths(&file("train/policy/load.rs", line)), line);
    for name in DROPS_GRADIENTS {
        let line = format!("let y = x.{name}(&op)?;");
        finds(dropped_gradients(&file("model/decoder.rs", &line)), &line);
        assert!(dropped_gradients(&file("ops/rope.rs", &line)).is_empty());
    }
    for name in DROPS_GRADIENTS_IN_CANDLE_NN {
        for line in [
            format!("let y = candle_nn::ops::{name}(&x)?;"),
            format!("use candle_nn::{{Linear, ops::{{log_softmax, {name}}}}};"),
        ] {
            finds(dropped_gradients(&file("model/decoder.rs", &line)), &line);
        }
        let own = format!("use crate::ops::{name};");
        assert!(dropped_gradients(&file("model/decoder.rs", &own)).is_empty());
    }
    for line in ["use candle_nn::ops;", "use candle_nn::ops::*;"] {
        finds(dropped_gradients(&file("model/decoder.rs", line)), line);
    }
    let circle = [
        file("train/a.rs", "use super::b::B;"),
        file("train/b.rs", "use crate::train::{c::C, d};"),
        file("train/c.rs", "use super::Again;"),
        file("train/d.rs", "use super::c::C;"),
        file("train/mod.rs", "mod a;\nmod b;\nmod c;\nmod d;\npub use a::Again;"),
    ];
    let needed =
        [["train/a.rs", "train/b.rs", "train/c.rs", "train/d.rs"].map(String::from).to_vec()];
    assert_eq!(circles(&circle), needed);
    assert!(circles(&circle[1..]).is_empty());
}

/// There are no dependency cycles of files, so that they can be read one after another.
#[test]
fn files_of_a_room_use_each_other_in_no_circle() {
    let mut faults = Vec::new();
    for room in ROOMS {
        let files: Vec<SourceFile> =
            sources().into_iter().filter(|file| file.room() == *room).collect();
        faults.extend(circles(&files));
    }
    faults.retain(|circle| {
        let is_known = |known: &&[&str]| circle.iter().all(|file| known.contains(&&**file));
        !KNOWN_CIRCLES.iter().any(is_known)
    });
    assert!(faults.is_empty(), "{faults:#?}");
}

/// Circles that are left: no other file may join them.
const KNOWN_CIRCLES: &[&[&str]] = &[
    &["ops/gemm/kernel.rs", "ops/gemm/mod.rs", "ops/gemm/pack.rs", "ops/mod.rs"],
    &["ops/row_dot/formats.rs", "ops/row_dot/i16_vector.rs", "ops/row_dot/kernel.rs"],
    &["weights/checkpoint.rs", "weights/gguf.rs", "weights/safetensors.rs"],
    &[
        "text/added.rs",
        "text/folder.rs",
        "text/gguf.rs",
        "text/sentencepiece.rs",
        "text/stream.rs",
        "text/tokenizer.rs",
    ],
    &["model/config.rs", "model/config/gguf.rs", "model/config/json.rs"],
    &["rollout/command.rs", "rollout/rewards.rs", "rollout/rule.rs"],
    &["export/chunk.rs", "export/source.rs"],
    &[
        "cli/chat.rs",
        "cli/chat/session.rs",
        "cli/combining.rs",
        "cli/completions.rs",
        "cli/data.rs",
        "cli/eval.rs",
        "cli/export.rs",
        "cli/generate.rs",
        "cli/inspect.rs",
        "cli/loading.rs",
        "cli/merge.rs",
        "cli/mod.rs",
        "cli/pretrain.rs",
        "cli/replies.rs",
        "cli/tokenizer.rs",
        "cli/train.rs",
    ],
];

/// Cycles of files: the strongly connected components of more than one file.
fn circles(files: &[SourceFile]) -> Vec<Vec<String>> {
    let modules: BTreeMap<Vec<String>, usize> =
        files.iter().enumerate().map(|(i, file)| (module_of(&file.path), i)).collect();
    let edges: Vec<BTreeSet<usize>> =
        files.iter().enumerate().map(|(i, file)| uses(i, file, files, &modules)).collect();
    let reaches = |from: usize| {
        let (mut seen, mut open) = (BTreeSet::new(), vec![from]);
        while let Some(file) = open.pop() {
            open.extend(edges[file].iter().filter(|&&next| seen.insert(next)));
        }
        seen
    };
    let reached: Vec<BTreeSet<usize>> = (0..files.len()).map(reaches).collect();
    let mut found = BTreeSet::new();
    for file in (0..files.len()).filter(|&file| reached[file].contains(&file)) {
        let circle = reached[file].iter().filter(|&&other| reached[other].contains(&file));
        let mut circle: Vec<String> = circle.map(|&other| files[other].path.clone()).collect();
        circle.sort();
        found.insert(circle);
    }
    found.into_iter().filter(|circle| circle.len() > 1).collect()
}

/// The module of a file: `train/policy/mod.rs` is `train::policy`.
fn module_of(path: &str) -> Vec<String> {
    let path = path.strip_suffix(".rs").unwrap();
    let path = path.strip_suffix("/mod").unwrap_or(path);
    path.split('/').map(String::from).collect()
}

/// The files of the same room that a file uses. The parent that a module is declared in is used only
/// for its own definitions: names that it re-exports belong to their file, and its declarations and
/// re-exports of children do not count as uses.
fn uses(
    index: usize,
    file: &SourceFile,
    files: &[SourceFile],
    modules: &BTreeMap<Vec<String>, usize>,
) -> BTreeSet<usize> {
    let here = module_of(&file.path);
    let code = SourceFile { path: file.path.clone(), code: without_re_exports(&file.code) };
    let mut found = BTreeSet::new();
    let mut paths = code.paths();
    paths.sort();
    paths.dedup();
    for path in paths {
        if let Some(target) = resolve(&absolute(&here, &path), files, modules, 0)
            && target != index
        {
            found.insert(target);
        }
    }
    found
}

/// The file that a path leads to, through re-exports.
fn resolve(
    path: &[String],
    files: &[SourceFile],
    modules: &BTreeMap<Vec<String>, usize>,
    depth: usize,
) -> Option<usize> {
    let (length, target) =
        (1..=path.len()).rev().find_map(|length| Some((length, *modules.get(&path[..length])?)))?;
    let Some(name) = path.get(length) else { return Some(target) };
    if depth < 8 {
        let module = module_of(&files[target].path);
        for export in re_exports(&files[target].code) {
            if export.last() == Some(name) || export.last().is_some_and(|last| last == "*") {
                let export = absolute(&module, &export);
                if let Some(found) = resolve(&export, files, modules, depth + 1) {
                    return Some(found);
                }
            }
        }
    }
    Some(target)
}

/// Statements `pub use ..;` and `pub(..) use ..;` of a file.
fn re_export_statements(code: &str) -> Vec<&str> {
    let begins = |line: &str| {
        line.starts_with("pub use ") || (line.starts_with("pub(") && line.contains(") use "))
    };
    let mut found = Vec::new();
    let mut at = 0;
    for line in code.split_inclusive('\n') {
        if begins(line) {
            let end = code[at..].find(';').map_or(code.len(), |end| at + end + 1);
            found.push(&code[at..end]);
        }
        at += line.len();
    }
    found
}

fn re_exports(code: &str) -> Vec<Vec<String>> {
    let paths = |statement: &&str| {
        let path = statement.split_once(" use ").map_or("", |(_, path)| path.trim_end_matches(';'));
        SourceFile { path: String::new(), code: String::new() }.expand(path)
    };
    re_export_statements(code).iter().flat_map(paths).collect()
}

fn without_re_exports(code: &str) -> String {
    let mut code = code.to_string();
    for statement in re_export_statements(&code.clone()) {
        code = code.replace(statement, "");
    }
    code
}
