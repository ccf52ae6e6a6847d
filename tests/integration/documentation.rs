//! README, docs/ and ARCHITECTURE.md against the tree: links and names exist.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The Markdown files that describe the current repository.
fn pages() -> Vec<PathBuf> {
    let names = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "benches/README.md"];
    let mut pages: Vec<PathBuf> = names.iter().map(|name| root().join(name)).collect();
    pages.push(root().join("scripts/golden/README.md"));
    let docs = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let golden = fs::read_dir(root().join("tests/golden")).unwrap();
    pages.extend(docs);
    pages.extend(golden.map(|entry| entry.unwrap().path().join("README.md")));
    pages.sort();
    pages
}

/// The anchor of a heading on a rendered page.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase().replace(' ', "-");
    kept.chars().filter(|c| c.is_alphanumeric() || *c == '-' || *c == '_').collect()
}

#[test]
fn links_of_the_documentation_exist() {
    let mut broken = Vec::new();
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap_or_else(|e| panic!("{}: {e}", page.display()));
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("http") {
                continue;
            }
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target =
                if path.is_empty() { page.clone() } else { page.parent().unwrap().join(path) };
            let known = |text: &str| {
                text.lines().any(|line| {
                    line.strip_prefix('#')
                        .is_some_and(|line| anchor(line.trim_start_matches('#')) == heading)
                })
            };
            let there = target.exists()
                && (heading.is_empty() || fs::read_to_string(&target).is_ok_and(|t| known(&t)));
            if !there {
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

/// Whether a text in backticks is a path of this repository.
fn is_path(span: &str) -> bool {
    let rooms = ["src/", "adapters/", "tests/", "scripts/", "docs/", "benches/", "examples/"];
    rooms.iter().any(|room| span.starts_with(room))
        && span.chars().all(|c| c.is_ascii_alphanumeric() || "/._-{},*".contains(c))
}

/// `a/{b,c}.rs` is `a/b.rs` and `a/c.rs`.
fn alternatives(path: &str) -> Vec<String> {
    let Some((before, rest)) = path.split_once('{') else { return vec![path.to_string()] };
    let (inside, after) = rest.split_once('}').expect("a closing brace");
    let each = |part: &str| alternatives(&format!("{before}{part}{after}"));
    inside.split(',').flat_map(each).collect()
}

#[test]
fn paths_in_the_documentation_exist() {
    let mut missing = Vec::new();
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        for span in text.split('`').skip(1).step_by(2).filter(|span| is_path(span)) {
            for path in alternatives(span) {
                let found = if path.contains('*') {
                    let folder = Path::new(&path).parent().unwrap();
                    root().join(folder).is_dir()
                } else {
                    root().join(&path).exists()
                };
                if !found {
                    missing.push(format!("{}: {path}", page.display()));
                }
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

/// Whether a source defines a type or a variant of an enum, or a method or module of that name.
fn defines(code: &str, name: &str) -> bool {
    let mut lines = code.lines().map(str::trim_start).filter(|line| !line.starts_with("//"));
    lines.any(|line| {
        line.match_indices(name).any(|(at, _)| {
            let (before, behind) = (&line[..at], &line[at + name.len()..]);
            let ends = !behind.starts_with(|c: char| c.is_alphanumeric() || c == '_');
            let keywords = ["struct ", "enum ", "trait ", "type ", "fn ", "mod "];
            let is_variant = before.is_empty() && behind.starts_with([',', '(', ' ']);
            ends && (is_variant || keywords.iter().any(|keyword| before.ends_with(keyword)))
        })
    })
}

/// Types of the standard library and of candle that ARCHITECTURE.md names.
const OTHERS_TYPES: &[&str] = &["Arc", "QMatMul"];

/// ARCHITECTURE.md and the sources use the same names: a type that it names is defined somewhere.
#[test]
fn types_in_the_architecture_exist() {
    let mut sources = Vec::new();
    for folder in ["src", "adapters/src"] {
        crate::binary::walk(&root().join(folder), &mut sources);
    }
    let code: Vec<String> =
        sources.iter().map(|file| fs::read_to_string(file).unwrap_or_default()).collect();
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let is_type = |span: &&str| {
        span.starts_with(|c: char| c.is_ascii_uppercase())
            && span.chars().all(|c| c.is_ascii_alphanumeric() || c == ':' || c == '_')
            && span.contains(|c: char| c.is_ascii_lowercase())
    };
    let mut unknown = Vec::new();
    for span in text.split('`').skip(1).step_by(2).filter(is_type) {
        for name in span.split("::").filter(|name| !OTHERS_TYPES.contains(name)) {
            if !code.iter().any(|code| defines(code, name)) {
                unknown.push(span);
            }
        }
    }
    assert!(unknown.is_empty(), "{unknown:#?}");
}
